"""Remove half of the structure of many models, with secateur and with its peers, and check every result by its outputs.

    python benchmarks/zoo.py [--models LLaMA,GPT-2] [--tools secateur,torch-pruning] [--jobs 2]

The models: every family of families.yaml with random weights, the nets of tests/structure/nets.py, and real ones
(EfficientNet-Lite0, ResNet-56, MiniLM, SmolLM2) where they can be had, all in float64. The peers (Torch-Pruning with and
without hints, torch-kirigami) are installed into build/peers by this script. No tool's own word is taken for a result: the
kept indices are recovered from the values of the weights, and the cut model has to compute what the model does in which all
else is zero, with norms over what remains. For secateur also: half of every kind alone, a block, an attention and an
MLP, and how each of these loads again. A tool has LIMIT seconds for a model. Writes results/zoo.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import families
from common import RESULTS, ROOT, SHARED, machine, write
from secateur.errors import SecateurError
from secateur.forward import no_cache
from secateur.stream.observe import make_observable
from secateur.stream.skeleton import may_be_missing
from secateur.structure import Plan, apply_, plan, plan_layers, plan_sublayers, save, trace
from secateur.structure.apply import dead_from
from secateur.structure.attention import SplitAttention, replace_
from secateur.structure.proof import Masked, difference
from secateur.structure.running import cached, runner
from secateur.structure.saved import OURS, STOCK
from secateur.structure.surgery import Cut, mask_
from secateur.structure.watch import follow, located, outputs_of, plainly

PEERS = ROOT / "build/peers"
VERSIONS = {"torch-pruning": "1.6.1", "torch-kirigami": "0.2.1"}
EXACT, REPEATS = 1e-5, 9
LIMIT = {"secateur": 120}  # seconds for a model
PEERS_LIMIT, LARGER = 30, 10  # of the others; times so many for real models
Model = tuple[nn.Module, Any]
sys.path[:0] = [str(ROOT / "tests/structure"), str(PEERS)]


# The models


def models() -> dict[str, Callable[[], Model | None]]:
    """Name -> what makes a model and its inputs."""
    from nets import NETS

    found: dict[str, Callable[[], Model | None]] = {}
    for name, family in families.families().items():
        found[name] = lambda family=family: _family(family)
    for name, make in NETS.items():
        found[f"net: {name}"] = lambda make=make: _net(make)
    return found | REAL


def _family(family: families.Family) -> Model:
    model = families.build(family)
    make_observable(model)
    return model, {**families._batch(family, 0), **no_cache(model)}


def _net(make: Callable[[], Model]) -> Model:
    torch.manual_seed(0)
    model, inputs = make()
    return model.eval(), inputs


def _smollm2() -> Model | None:
    folder = ROOT / "build/smollm2"
    if not folder.exists():
        return None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(5, 40000, (2, 11), generator=torch.Generator().manual_seed(0))
    return model, {"input_ids": ids, "use_cache": False}


def _resnet56() -> Model | None:
    path = SHARED / "models/resnet56.safetensors"
    if not path.exists():
        return None
    from safetensors.torch import load_file

    from vision import CifarResNet

    model = CifarResNet(56)
    model.load_state_dict(load_file(path))
    return model.eval(), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _efficientnet() -> Model | None:
    from vision import efficientnet_lite0

    model = efficientnet_lite0()
    if model is None:
        return None
    return model.eval(), torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def _minilm() -> Model | None:
    from vision import minilm

    model = minilm()
    if model is None:
        return None
    ids = torch.randint(1000, 20000, (2, 13), generator=torch.Generator().manual_seed(0))
    return model.eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


REAL: dict[str, Callable[[], Model | None]] = {
    "real: SmolLM2-135M": _smollm2,
    "real: ResNet-56": _resnet56,
    "real: EfficientNet-Lite0": _efficientnet,
    "real: MiniLM-L6": _minilm,
}


# The tools: each cuts a model in place


def secateur(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Half of everything whose removal equals masking; where there is no such thing, of everything."""
    started = time.perf_counter()
    couplings = trace(model, inputs)
    traced = time.perf_counter()
    able = [c for c in couplings if c.kind != "head_dim"]
    kinds = [c.name for c in able if c.exact] or [c.name for c in able]
    if not kinds:
        raise Refused("; ".join(sorted(set(couplings.protected.values())))[:300])
    found = plan(couplings, remove=dict.fromkeys(kinds, 0.5), multiple=1, least=0.01)
    planned = time.perf_counter()
    parts = {
        kind: plan(couplings, remove={kind: 0.5}, multiple=1, least=0.01)
        for kind in {c.kind for c in able}
        if hasattr(getattr(model, "config", None), "to_dict")
    }
    apply_(model, found, inputs)
    return {
        "trace seconds": traced - started,
        "plan seconds": planned - traced,
        "couplings": len(couplings),
        "plans": [found],
        "parts": parts,
    }


class Refused(Exception):
    """The tool said that nothing can be removed, and why."""


def torch_pruning(hints: bool) -> Callable[[nn.Module, Any], dict[str, Any]]:
    """Torch-Pruning's magnitude pruner at 50 %, and what a careful user would tell it."""

    def cut(model: nn.Module, inputs: Any) -> dict[str, Any]:
        import torch_pruning as tp

        options: dict[str, Any] = _hints(model) if hints else {}
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv1d))]
        ignored = [
            m for n, m in model.named_modules() if n.split(".")[-1] in ("lm_head", "classifier", "head", "score")
        ]
        options["ignored_layers"] = ignored or layers[-1:]
        started = time.perf_counter()
        pruner = tp.pruner.MagnitudePruner(
            model,
            inputs,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5,
            output_transform=lambda out: sum(t.float().sum() for t in outputs_of(out) if t.is_floating_point()),
            **options,
        )
        pruner.step()
        if hints:
            _follow_heads(model, pruner)
        return {"plan seconds": time.perf_counter() - started}

    return cut


def _hints(model: nn.Module) -> dict[str, Any]:
    """Head counts of query, key and value layers, and parameters that stand outside layers."""
    config = getattr(model, "config", None)
    heads = _field(config, "num_attention_heads", "n_head", "num_heads")
    groups = _field(config, "num_key_value_heads") or heads
    counts = {}
    for name, module in model.named_modules():
        last = name.split(".")[-1]
        if heads and isinstance(module, nn.Linear) and module.out_features % heads == 0:
            if last in ("q_proj", "query", "q", "query_proj", "q_lin", "qkv", "query_key_value", "in_proj"):
                counts[module] = heads
            elif last in ("k_proj", "key", "k", "key_proj", "k_lin", "v_proj", "value", "v", "value_proj", "v_lin"):
                counts[module] = groups
    norms = {type(m) for m in model.modules() if not isinstance(m, LAYERS) and _is_norm(m)}
    known = {
        id(p) for m in model.modules() if isinstance(m, LAYERS) or type(m) in norms for p in m.parameters(recurse=False)
    }
    loose = [(p, p.ndim - 1) for p in model.parameters() if id(p) not in known]
    options = {"num_heads": counts, "prune_num_heads": True, "head_pruning_ratio": 0.5, "unwrapped_parameters": loose}
    return options | {"customized_pruners": {kind: _norm_pruner() for kind in norms}}


def _is_norm(module: nn.Module) -> bool:
    """A module with nothing but a scale: the RMS norms of transformers."""
    own = dict(module.named_parameters())
    return list(own) == ["weight"] and own["weight"].ndim == 1


def _norm_pruner() -> Any:
    import torch_pruning as tp

    class Norm(tp.function.BasePruningFunc):
        def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
            kept = sorted(set(range(len(layer.weight))) - set(idxs))
            layer.weight = nn.Parameter(layer.weight.data[kept])
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: Any) -> int:
            return len(layer.weight)

        get_in_channels = get_out_channels

    return Norm()


LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.LayerNorm, nn.modules.batchnorm._NormBase, nn.GroupNorm)


def _field(config: Any, *names: str) -> int | None:
    return next((v for n in names if isinstance(v := getattr(config, n, None), int)), None)


def _follow_heads(model: nn.Module, pruner: Any) -> None:
    for module in model.modules():
        for child, count in pruner.num_heads.items():
            if any(child is own for own in module.children()):
                for name in ("num_heads", "num_attention_heads", "n_heads"):
                    if hasattr(module, name) and child.out_features % count == 0:
                        setattr(module, name, count)
                if hasattr(module, "all_head_size"):
                    module.all_head_size = child.out_features


def kirigami(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """torch-kirigami's greedy planner down to half of the parameters that it can reach."""
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Greedy, GroupMagnitude, ParameterBudget, Pruner

    given = {"kwargs": inputs} if isinstance(inputs, dict) else {"args": (inputs,)}
    started = time.perf_counter()
    graph = DependencyGraph.build(model, **given)
    traced = time.perf_counter()
    pruner = Pruner(model, graph=graph)
    candidates = pruner.discover_candidates()
    size = sum(p.numel() for p in model.parameters())
    last: Exception | None = None
    for share in (0.5, 0.75, 0.9):
        try:
            budget = ParameterBudget(max_params=int(share * size))
            done = pruner.prune(candidates, budget=budget, strategy=Greedy(GroupMagnitude(p=2)))
            break
        except Exception as error:
            last = error
    else:
        raise Refused(str(last)[:300])
    seconds = {"trace seconds": traced - started, "plan seconds": time.perf_counter() - traced}
    return {**seconds, "share": share, "recomputed": "zero masks are not equivalent" in str(done)}


TOOLS: dict[str, Callable[[nn.Module, Any], dict[str, Any]]] = {
    "secateur": secateur,
    "torch-pruning, hints": torch_pruning(True),
    "torch-pruning": torch_pruning(False),
    "torch-kirigami": kirigami,
}


# The judge


def kept_indices(before: Tensor, after: Tensor) -> dict[int, np.ndarray] | None:
    """Which indices of each dimension stay, found by the values; None where they are no grid of the original's."""
    if before.dtype != after.dtype:  # some modules go down to float32 as they run
        before, after = before.float(), after.float()
    if before.ndim != after.ndim or before.ndim == 0 or not after.numel():
        return {} if before.shape == after.shape else None
    if len(torch.unique(before)) < before.numel():
        return _kept_slices(before.detach(), after.detach())
    old, new = before.detach().flatten().numpy(), after.detach().flatten().numpy()
    order = np.argsort(old, kind="stable")
    places = np.searchsorted(old[order], new)
    if (places >= len(old)).any():
        return None
    found = order[places]
    if not np.array_equal(old[found], new):
        return None
    indices = np.stack(np.unravel_index(found, tuple(before.shape))).reshape(before.ndim, *after.shape)
    kept = {}
    for dim in range(before.ndim):
        rows = np.moveaxis(indices[dim], dim, 0).reshape(after.shape[dim], -1)
        if (rows != rows[:, :1]).any() or (np.diff(rows[:, 0]) <= 0).any():
            return None
        if len(rows) < before.shape[dim]:
            kept[dim] = rows[:, 0].copy()
    return kept


def _kept_slices(before: Tensor, after: Tensor) -> dict[int, np.ndarray] | None:
    """The same for values of which some are equal (a table of sines): by whole slices, where one dimension is cut."""
    cut = [dim for dim in range(before.ndim) if before.shape[dim] != after.shape[dim]]
    if not cut:
        return {} if torch.equal(before, after) else None
    if len(cut) > 1:
        return None
    old, new = before.movedim(cut[0], 0), after.movedim(cut[0], 0)
    kept: list[int] = []
    for row in new:
        start = kept[-1] + 1 if kept else 0
        place = next((i for i in range(start, len(old)) if torch.equal(old[i], row)), None)
        if place is None:
            return None
        kept.append(place)
    return {cut[0]: np.array(kept)}


def judge(original: nn.Module, cut: nn.Module, inputs: Any) -> dict[str, Any]:
    """Whether the cut model computes what the masked one does. exact: to 1e-5 of the largest output."""
    old = dict(original.named_parameters(remove_duplicate=False))
    new = dict(cut.named_parameters(remove_duplicate=False))
    sizes = {"params": sum(p.numel() for p in original.parameters()), "after": sum(p.numel() for p in cut.parameters())}
    with torch.no_grad():
        try:
            got = [t for t in outputs_of(runner(cut, inputs)()) if t.is_floating_point()]
        except Exception as error:
            return {**sizes, "verdict": "does not run", "why": f"{type(error).__name__}: {str(error)[:200]}"}
        if sizes["after"] == sizes["params"]:
            return {**sizes, "verdict": "nothing removed"}
        if old.keys() != new.keys():
            return {**sizes, "verdict": "cannot be judged", "why": "parameters have other names"}
        kept = {}
        for name in old:
            found = kept_indices(old[name], new[name])
            if found is None and not bool(torch.isin(new[name], old[name]).all()):
                return {**sizes, "verdict": "silently wrong", "why": f"{name} is no part of the original"}
            kept[name] = found
        if any(found is None for found in kept.values()):  # no grid: other inputs of every group of a convolution
            apart = _apart_by_values(original, new, inputs, got)
        else:
            apart = _apart(original, {name: dims for name, dims in kept.items() if dims}, inputs, got)
    return {**sizes, "verdict": "exact" if apart <= EXACT else "silently wrong", "difference": apart}


def _apart_by_values(original: nn.Module, new: dict[str, Tensor], inputs: Any, got: list[Tensor]) -> float:
    """The difference from the model in which all values are zero that the cut one does not have."""
    before = {name: parameter.data for name, parameter in original.named_parameters()}
    try:
        for name, parameter in original.named_parameters():
            parameter.data = torch.where(torch.isin(parameter.data, new[name]), parameter.data, 0.0)
        return difference([t for t in outputs_of(runner(original, inputs)()) if t.is_floating_point()], got)
    finally:
        for name, parameter in original.named_parameters():
            parameter.data = before[name]


def _apart(original: nn.Module, kept: dict[str, dict[int, np.ndarray]], inputs: Any, got: list[Tensor]) -> float:
    """The difference from the masked model, as it is or with norms over what remains: the smaller one counts."""
    run = runner(original, inputs)
    cut = Cut(kept, [{}])
    undo = mask_(original, cut)
    try:
        plain = difference([t for t in outputs_of(run()) if t.is_floating_point()], got)
    finally:
        undo()
    if plain <= EXACT:
        return plain
    back = replace_(original)
    facts = follow(original, run)
    dead = dead_from(facts, cut)
    undo = mask_(original, cut)
    try:
        masked = Masked(original, facts, dead)
        with plainly(original), located(original, masked.where), masked:
            want = [t for t in outputs_of(run()) if t.is_floating_point()]
        return min(plain, difference(want, got))
    finally:
        undo()
        back()


# A row of the table


def examine(name: str, tools: list[str]) -> dict[str, Any]:
    """A model with every tool."""
    row: dict[str, Any] = {}
    for tool in tools:
        signal.signal(signal.SIGALRM, _too_long)
        limit = LIMIT.get(tool, PEERS_LIMIT) * (LARGER if name.startswith("real") else 1)
        signal.alarm(limit)
        try:
            row[tool] = _with(name, tool)
        except Refused as error:
            row[tool] = {"verdict": "refused", "why": str(error)}
        except TimeoutError:
            row[tool] = {"verdict": "too long", "why": f"more than {limit} seconds"}
        except Exception as error:
            row[tool] = {"verdict": "error", "why": f"{type(error).__name__}: {str(error)[:200]}"}
        finally:
            signal.alarm(0)
    return row


def _too_long(*_: object) -> None:
    raise TimeoutError


def _with(name: str, tool: str) -> dict[str, Any]:
    model, inputs = _make(name)
    original = copy.deepcopy(model)
    config = copy.deepcopy(getattr(model, "config", None))
    details = TOOLS[tool](model, inputs)
    plans, parts = details.pop("plans", None), details.pop("parts", {})
    told = details.pop("recomputed", False)
    found = judge(original, model, inputs) | details
    if told and found["verdict"] == "silently wrong":
        found["verdict"] = "not as masked, and says so"
    if found["verdict"] == "exact":
        found["speed-up"] = _speed_up(original, model, inputs)
        before, after = cached(original, inputs), cached(model, inputs)
        if before is not None and before.alike:  # elsewhere it would mean nothing
            found["generates"] = after is not None and after.alike
        if plans is not None:
            found |= _ours(model, plans, config, inputs)
            found["alone"] = dict(_alone(original, parts, config, inputs))
        elif config is not None:
            found["stock reload"] = _reloads(model, inputs)
    return found


def _make(name: str) -> Model:
    """In float64 where it runs so, no two weights equal and none zero: the judge goes by values."""
    made = models()[name]()
    if made is None:
        raise Refused("its files cannot be had here")
    model, inputs = made[0].double(), _double(made[1])
    try:
        with torch.no_grad():
            runner(model, inputs)()
    except RuntimeError:  # code that insists on float32
        model, inputs = model.float(), made[1]
    generator = torch.Generator().manual_seed(7)
    size = 1e-9 if name.startswith("real") else 1e-3
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point())
            if parameter.is_floating_point() and not may_be_missing(model, path):  # a table that its class computes
                _disturb(parameter, size, generator)
    for module in model.modules():  # what masks compute before each forward, so that the model can be copied
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                setattr(module, name, value.detach())
    return model, inputs


def _disturb(parameter: Tensor, size: float, generator: torch.Generator) -> None:
    """Add noise until no two values are equal."""
    again = torch.ones(parameter.shape, dtype=torch.bool)
    for _ in range(100):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        parameter.add_(torch.where(again, noise * size, 0.0))
        _, place, count = torch.unique(parameter, return_inverse=True, return_counts=True)
        again = count[place] > 1
        if not again.any():
            return


def _double(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {key: _double(value) for key, value in inputs.items()}
    return inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def _speed_up(before: nn.Module, after: nn.Module, inputs: Any) -> float:
    """Ratio of median times of a forward, taken in turns."""
    times: list[list[float]] = [[], []]
    with torch.no_grad():
        for repeat in range(REPEATS + 1):
            for place, model in enumerate((before, after)):
                run = runner(model, inputs)
                started = time.perf_counter()
                run()
                if repeat:
                    times[place].append(time.perf_counter() - started)
    return statistics.median(times[0]) / statistics.median(times[1])


def _ours(model: nn.Module, plans: list[Any], config: Any, inputs: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        split = any(isinstance(m, SplitAttention) for m in model.modules())
        if config is not None:
            found["reload"] = save(model, plans, Path(folder), config, [inputs])
            found["stock reload"] = found["reload"] == "stock"
        elif not split:
            found["reload"] = save(model, plans, Path(folder), checks=[inputs])
    return found


def _alone(model: nn.Module, parts: dict[str, Plan], config: Any, inputs: Any) -> Iterator[tuple[str, str]]:
    """What is removed alone -> how the model loads then, or why it cannot go."""
    if config is None or not parts:
        return
    ways = {kind: lambda found=found: found for kind, found in parts.items()}
    ways |= {
        "layers": lambda: plan_layers(model, inputs, 1),
        "attention": lambda: plan_sublayers(model, inputs, {"attention": 1}),
        "mlp": lambda: plan_sublayers(model, inputs, {"mlp": 1}),
    }
    for what, make in ways.items():
        try:
            found = make()
            cut = copy.deepcopy(model)
            apply_(cut, found, inputs)
            with tempfile.TemporaryDirectory() as folder:
                yield what, save(cut, [found], Path(folder), copy.deepcopy(config), [inputs])
        except SecateurError as error:
            yield what, str(error).split("\n")[0][:200]


def _reloads(model: Any, inputs: Any) -> bool:
    """Whether save_pretrained and from_pretrained give the cut model back."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            model.save_pretrained(folder)
            again = type(model).from_pretrained(folder).eval()
            want, got = ([t for t in outputs_of(runner(m, inputs)()) if t.is_floating_point()] for m in (model, again))
            return difference(want, got) <= EXACT
        except Exception:
            return False


def main() -> None:
    """Examine all models, or some, and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names, with semicolons (default: all)")
    parser.add_argument("--tools", default=";".join(TOOLS))
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    _install()
    names = args.models.split(";") if args.models else list(models())
    tools = args.tools.split(";")
    path = RESULTS / "zoo.json"
    rows: dict[str, Any] = json.loads(path.read_text())["models"] if path.exists() else {}
    started = time.perf_counter()
    threads = max(1, torch.get_num_threads() // args.jobs)
    with ProcessPoolExecutor(args.jobs, initializer=families.quiet, initargs=(threads,)) as pool:
        for name, found in zip(names, pool.map(examine, names, [tools] * len(names)), strict=True):
            rows[name] = rows.get(name, {}) | found
            shown = " | ".join(f"{tool}: {row['verdict']}" for tool, row in found.items())
            print(f"{name:32s} {shown}", flush=True)
            write(path, _content(rows, started))
    write(path, _content(rows, started))
    for tool in TOOLS:
        print(tool, json.dumps(_counts(rows, tool)))


def _content(rows: dict[str, Any], started: float) -> dict[str, Any]:
    return {
        "seconds": round(time.perf_counter() - started),
        "versions": VERSIONS,
        "counts": {tool: _counts(rows, tool) for tool in TOOLS},
        "models": rows,
        "machine": machine(),
    }


def _counts(rows: dict[str, Any], tool: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in rows.values():
        if tool in row:
            for key in _marks(row[tool]):
                found[key] = found.get(key, 0) + 1
    return found


def _marks(row: dict[str, Any]) -> Iterator[str]:
    yield row["verdict"]
    if row.get("stock reload"):
        yield "stock reload"
    if row.get("reload"):
        yield "reload"
    if row.get("generates"):
        yield "generates"
    for what, loads in row.get("alone", {}).items():
        yield f"{what} alone: {loads if loads in (STOCK, OURS) else 'not to be had'}"


def _install() -> None:
    """The peers, into a folder of their own."""
    wanted = [f"{name}=={version}" for name, version in VERSIONS.items()]
    if all((PEERS / name.replace("-", "_")).exists() for name in VERSIONS):
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(PEERS), *wanted]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
