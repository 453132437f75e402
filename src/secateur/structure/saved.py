"""Write a cut model so that it loads again, by stock libraries where its shapes allow, and load it."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from secateur._version import __version__
from secateur.errors import SecateurError
from secateur.probe import answer, difference, digest
from secateur.stream.checkpoint import DTYPES, OWN, SINGLE, Checkpoint, open_checkpoint
from secateur.stream.naming import Naming
from secateur.stream.skeleton import may_be_missing
from secateur.structure.apply import reshape_
from secateur.structure.hf_config import configs_for
from secateur.structure.plans import Plan, inputs_from
from secateur.structure.running import Inputs, evaluating, runner
from secateur.structure.watch import tensors_of

MANIFEST, WEIGHTS = "secateur.json", SINGLE
STOCK, OURS = "stock", "secateur.load"
TOLERANCE = 1e-4  # of the largest output, reloaded against in memory
CONFIGS = 6  # that are tried by loading


def save(model: nn.Module, plans: Sequence[Plan], out: Path, config: Any = None, checks: Sequence[Inputs] = ()) -> str:
    """Write a cut model into a folder that exists, and verify it by loading it again. Returns how it loads.

    plans: what was applied to it, in that order. config: the Hugging Face config from before the cut, for models that have
    one. checks: inputs on which the reloaded model has to answer as the one in memory.

    Raises SecateurError when what was loaded differs.
    """
    checks = list(checks) or [inputs_from(plans[-1].inputs)]
    want = _answers(model, checks)
    how = OURS
    absent = any(plan.sublayers for plan in plans)  # which no config can say
    if config is not None and not absent and _stock(model, plans, out, config, checks, want):
        how = STOCK
    elif config is not None:
        state = model.config
        model.config = config
        model.save_pretrained(out)  # type: ignore[operator]
        model.config = state
        _keep_from_stock(out)
    else:
        save_model(model, str(out / WEIGHTS))
    content = {
        "format": 1,
        "versions": {"secateur": __version__, "torch": torch.__version__},
        "loads with": how,
        "plans": [plan.to_json() for plan in plans],
        "probe": digest(_answers(model, [inputs_from(plans[-1].inputs)])[0]),
        "experts": model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None,  # type: ignore[operator]
    }
    (out / MANIFEST).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    if how == OURS and config is not None:
        try:
            again = load(out)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            kind = type(model).__name__
            raise SecateurError(f"the cut {kind} cannot be built again: {type(error).__name__}: {error}") from error
        _compute_alike(again, model)
        _compare(again, checks, want, "secateur.load")
    return how


def write_config(model: nn.Module, plan: Plan, folder: Path, out: Path) -> str:
    """config.json and secateur.json of a checkpoint that was cut on its shards; how it loads. model: on the meta device,
    as it was before the cut.

    The first config that has the cut shapes is taken: its outputs are compared where the result is loaded.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    shapes |= {name: tuple(change.after) for name, change in plan.tensors.items()}
    found = next(iter(configs_for(model, model.config, shapes, ())), None)
    how = OURS if found is None else STOCK
    if found is None:
        (out / "config.json").write_bytes((folder / "config.json").read_bytes())
        _keep_from_stock(out)
    else:
        found.architectures = [type(model).__name__]
        found.save_pretrained(out)
    content = {"format": 1, "loads with": how, "plans": [plan.to_json()], "probe": None}
    (out / MANIFEST).write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    return how


def _keep_from_stock(out: Path) -> None:
    """Other names for the weights of a model whose config does not say what is gone: stock libraries would fill what they
    miss with random numbers, and only warn.
    """
    for name, own in OWN.items():
        if (out / name).exists():
            (out / name).rename(out / own)


def _stock(
    model: nn.Module, plans: Sequence[Plan], out: Path, config: Any, checks: Sequence[Inputs], want: list[Tensor]
) -> bool:
    """Whether a config was found with which stock transformers loads the model and answers the same."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    ratios = {
        Fraction(removal.left, removal.size)
        for plan in plans
        for removal in plan.removals
        if removal.kind in ("heads", "queries") and removal.left < removal.size
    }
    start = model.config if any(plan.layers for plan in plans) else config
    current = model.config
    for found in itertools.islice(configs_for(model, start, shapes, ratios), CONFIGS):
        model.config = found
        try:
            model.save_pretrained(out)  # type: ignore[operator]
            again = _whole_double(type(model).from_pretrained(out, dtype=next(model.parameters()).dtype))  # type: ignore[attr-defined]
            _compute_alike(again, model)
            _compare(again, checks, want, "stock transformers")
            return True
        except Exception:  # of transformers' many checks of a config; then it is not this one
            model.config = current
    return False


def _whole_double(model: nn.Module) -> nn.Module:
    """A model in float64 with its buffers, which transformers makes in float32 whatever the weights are."""
    return model.double() if next(model.parameters()).dtype == torch.float64 else model


def _compute_alike(again: Any, model: Any) -> None:
    """Experts one by one, or as a grouped product: as the model in memory does it."""
    if hasattr(again, "set_experts_implementation"):
        again.set_experts_implementation(model.get_experts_implementation())


@contextlib.contextmanager
def _experts(model: Any, how: str | None) -> Iterator[None]:
    """Experts are computed in this way meanwhile."""
    before = model.get_experts_implementation() if how and hasattr(model, "get_experts_implementation") else None
    if before is not None:
        model.set_experts_implementation(how)
    try:
        yield
    finally:
        if before is not None:
            model.set_experts_implementation(before)


def _answers(model: nn.Module, checks: Sequence[Inputs]) -> list[Tensor]:
    with torch.no_grad(), evaluating(model):
        return [answer(runner(model, inputs)()).detach().float().cpu() for inputs in checks]


def _compare(model: nn.Module, checks: Sequence[Inputs], want: Sequence[Tensor], how: str) -> None:
    for one, other in zip(want, _answers(model, checks), strict=True):
        apart = difference(one, other)
        if not apart <= TOLERANCE:
            raise SecateurError(
                f"reloaded by {how}, the model answers differently, by {apart:.1e} of the largest output"
            )


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model that secateur cut and wrote: built, given its shapes, filled, and its answer compared with the one kept.

    model: for a module of your own, a fresh one as it was before the cut. Hugging Face folders need none, and those whose
    shapes a config can describe are loaded by `from_pretrained` anyway.

    Raises SecateurError when the folder is none of secateur's, lacks something, or the answer differs.
    """
    path = Path(path)
    content = _manifest(path)
    plans = [Plan.from_json(values) for values in content["plans"]]
    if model is None and not (path / "config.json").exists():
        raise SecateurError(
            f"{path} holds a {plans[0].model} of your own: give one from before the cut, secateur.load(path, model=...)"
        )
    if model is None:
        model = _stock_model(path) if content["loads with"] == STOCK else _rebuilt(path, plans)
    else:
        for plan in plans:
            reshape_(model, plan)
        shards = open_checkpoint(path).shards
        _fill(model, {name: tensor for shard in shards for name, tensor in load_file(path / shard).items()})
    model.eval()
    if content["probe"] is None:
        return model
    with _experts(model, content.get("experts")):
        found = digest(_answers(model, [inputs_from(plans[-1].inputs)])[0])
    apart = difference(torch.tensor(content["probe"]["values"]), torch.tensor(found["values"]))
    if found["shape"] != content["probe"]["shape"] or not apart <= content["probe"]["tolerance"]:
        raise SecateurError(
            f"{path}: the loaded model does not answer its probe as it did when it was written (difference {apart:.1e}); "
            "the weights were changed or damaged."
        )
    return model


def _manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SecateurError(f"{path} has no {MANIFEST}: it is no result of secateur") from None
    except (OSError, ValueError) as error:
        raise SecateurError(f"{path / MANIFEST} cannot be read: {error}") from None
    if "plans" not in content:
        raise SecateurError(f"{path} was pruned in its weights, not in its shapes: load it as you loaded the original")
    return content


def _class_of(path: Path) -> tuple[Any, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    name = (config.architectures or [""])[0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise SecateurError(f"{path / 'config.json'} names the architecture {name!r}, which transformers does not have")
    return kind, config


def _stock_model(path: Path) -> nn.Module:
    kind, _ = _class_of(path)
    return _whole_double(kind.from_pretrained(path, dtype="auto"))


def _rebuilt(path: Path, plans: Sequence[Plan]) -> nn.Module:
    """From the original config, given the shapes of the plans, filled with the weights in the folder."""
    kind, config = _class_of(path)
    model = kind._from_config(config, dtype=torch.float32)
    for plan in plans:
        reshape_(model, plan)
    checkpoint = open_checkpoint(path)
    _fill(model, dict(_converted(model, checkpoint)))
    model.tie_weights()
    return _whole_double(model)


def _converted(model: nn.Module, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the model, from those on disk: prefixes, renamed layers, experts stored one by one."""

    def blank(name: str) -> Tensor:
        entry = checkpoint.entries[name]
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    naming = Naming(model, checkpoint.entries, blank)
    for group in naming.groups.values():
        yield from naming.assemble(group, checkpoint.read).items()


def _fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a state dict in the dtypes that it has; of tied tensors one name is enough."""
    for name, tensor in tensors_of(model).items():
        if name in weights and tensor.dtype != weights[name].dtype:
            tensor.data = tensor.data.to(weights[name].dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    given = {tensor.data_ptr() for name, tensor in model.state_dict().items() if name in weights}
    absent = [name for name in missing if model.state_dict()[name].data_ptr() not in given]
    lacking = [name for name in absent if not may_be_missing(model, name)]  # what its class computes was cut with it
    if unexpected or lacking:
        which = f"{unexpected[0]} is not of the model" if unexpected else f"{lacking[0]} is missing"
        raise SecateurError(f"the weights do not fit the planned model: {which}")
