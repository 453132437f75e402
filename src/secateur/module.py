"""Prune a module that a function of the user's builds, from and to a safetensors file.

For models that stock transformers does not know. Everything is in memory; no pickle is ever opened.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur import data as inputs
from secateur.card import card, environment, manifest
from secateur.data import Batch, Data, call
from secateur.data.tensors import TENSOR_SUFFIXES
from secateur.errors import SecateurError
from secateur.forward import no_cache
from secateur.machine import check_device
from secateur.memory import peak_memory
from secateur.pipeline import check_out
from secateur.plan import Plan, make_plan
from secateur.probe import TOLERANCE, answer, difference, digest
from secateur.prune import InPlace, Job, Progress, Report, no_progress, run
from secateur.recipe import Recipe, nearest
from secateur.stream.checkpoint import DTYPES, PICKLES, SINGLE, Checkpoint, open_file
from secateur.stream.staging import Staging
from secateur.stream.walk import Resident, randomness


@dataclass
class Built:
    """A module with its weights, and everything that was checked about it. Nothing is written yet."""

    make: Callable[[], nn.Module]
    module: nn.Module
    weights: Checkpoint
    plan: Plan
    data: Data | None


class Rounded(InPlace):
    """Pruned weights are rounded to what the file stores, so that what is measured is what is written."""

    def __init__(self, weights: Checkpoint, module: nn.Module) -> None:
        self.weights = weights
        together: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            together.setdefault(id(parameter), []).append(name)
        self._names = {name: names for names in together.values() for name in names}  # all names of what is tied

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        entry = next((e for n in self._names.get(parameter, ()) if (e := self.weights.entries.get(n))), None)
        return None if entry is None else DTYPES[entry.dtype]


def prune_built(
    build: str,
    weights: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Report:
    """Prune the module that `build` ("package.module:function") makes, with the weights of a safetensors file.

    Writes out/model.safetensors with the same names and dtypes, secateur.json and a model card; the file is loaded into
    a module built afresh and compared before `out` gets its name. resume: begin again over an unfinished run.

    Raises SecateurError for every mistake that can be known before work starts, and when the result does not verify.
    """
    built = examine_built(build, weights, recipe, out, device)
    staging = Staging(built.weights, Path(out), _settings(built, build, recipe), resume)
    try:
        job = Job(built.module, built.plan, built.data, Resident(), Rounded(built.weights, built.module), progress)
        report = run(job)
        _write(report, built, staging, Path(weights), progress)
        return report
    except BaseException as error:
        staging.close(failed=isinstance(error, Exception))
        raise


def examine_built(build: str, weights: str | Path, recipe: Recipe, out: str | Path, device: str = "cpu") -> Built:
    """Build the module, load its weights, make the plan, read the data. Raises SecateurError; writes nothing."""
    check_device(device)
    path = Path(weights)
    check_out(path, Path(out))
    checkpoint = open_weights(path)
    make = find_function(build)
    module = fresh(make, checkpoint, recipe.dtype, device)
    plan = make_plan(module, recipe)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    data = _data(recipe, module, dtype, device)
    if data is not None:
        with torch.no_grad():
            Job(module, plan, data, Resident(), InPlace()).forward(
                data.batches[0]
            )  # a clear error when it does not run
    return Built(make, module, checkpoint, plan, data)


def open_weights(path: Path) -> Checkpoint:
    """A safetensors file, its header checked. Raises SecateurError; pickles are refused by name and by content."""
    if path.suffix.lower() in PICKLES:
        raise SecateurError(
            f"{path} is a pickle, which can run code when it is opened; expected a .safetensors file.\n"
            '  If you trust it, convert it once:  python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path}', weights_only=True), '{path.with_suffix('.safetensors')}')\""
        )
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise SecateurError(f"--weights {path} {found}; expected a .safetensors file with the module's state dict")
    return open_file(path)


def find_function(build: str) -> Callable[[], nn.Module]:
    """The function that "package.module:function" names; the current directory counts. Raises SecateurError."""
    name, _, attribute = build.partition(":")
    if not name or not attribute or not all(part.isidentifier() for part in [*name.split("."), *attribute.split(".")]):
        raise SecateurError(f"--build {build!r}: expected package.module:function, such as mypkg.models:resnet56")
    with _here_on_path():
        try:
            found: Any = importlib.import_module(name)
        except Exception as error:
            raise SecateurError(
                f"--build {build}: {name} cannot be imported from {Path.cwd()}: {_said(error)}"
            ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise SecateurError(f"--build {build}: {name} has no {attribute!r}{nearest(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise SecateurError(f"--build {build}: {attribute} is a {type(found).__name__}; expected a function")
    return cast(Callable[[], nn.Module], found)


@contextmanager
def _here_on_path() -> Iterator[None]:
    """A package of the user's is imported from where the command runs."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def fresh(
    make: Callable[[], nn.Module], weights: Checkpoint, dtype: str, device: str, *, frozen: bool = True
) -> nn.Module:
    """The module with the file's weights, in eval mode; frozen, or to be trained but for what `make` froze, unless that is
    all of it.
    """
    name = getattr(make, "__name__", str(make))
    try:
        with _here_on_path():
            module = make()
    except Exception as error:
        raise SecateurError(f"{name}() failed: {_said(error)}\n  It is called without arguments.") from error
    if not isinstance(module, nn.Module):
        raise SecateurError(f"{name}() returned a {type(module).__name__}; expected a torch.nn.Module")
    _load(module, weights)
    module = module.to(device) if dtype == "auto" else module.to(device, getattr(torch, dtype))
    if frozen:
        module.requires_grad_(False)
    elif not any(parameter.requires_grad for parameter in module.parameters()):
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    return module.eval()


def _load(module: nn.Module, weights: Checkpoint) -> None:
    """Load the file's tensors strictly. A tied tensor may stand in the file under one of its names, or under all."""
    state = module.state_dict()
    _check_names(state, weights)
    seen: dict[tuple[int, Any], str] = {}
    with torch.no_grad():
        for name in weights.entries:
            target, value = state[name], weights.read(name)
            if target.shape != value.shape:
                raise SecateurError(
                    f"{name} has shape {list(value.shape)} in {_file(weights)}; the module has {list(target.shape)}"
                )
            key = (target.data_ptr(), target.shape)
            first = seen.setdefault(key, name) if target.numel() else name
            if first != name and not torch.equal(weights.read(first), value):
                raise SecateurError(f"{first} and {name} are tied in the module, but differ in {_file(weights)}")
            target.copy_(value)


def _check_names(state: Mapping[str, Tensor], weights: Checkpoint) -> None:
    unknown = [name for name in weights.entries if name not in state]
    if unknown:
        more = f" and {len(unknown) - 1} more" if unknown[1:] else ""
        raise SecateurError(
            f"{_file(weights)} has {unknown[0]}{more}, which the module does not have{nearest(unknown[0], state)}.\n"
            "  The weights are another module's; a wrapper's prefix (module., model.) has to be cut off first."
        )
    given = {state[name].data_ptr() for name in weights.entries}
    missing = [name for name, value in state.items() if name not in weights.entries and value.data_ptr() not in given]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise SecateurError(
            f"{_file(weights)} lacks {missing[0]}{more}, which the module has{nearest(missing[0], weights.entries)}.\n"
            "  All of the state dict is needed: save it with safetensors.torch.save_model(module, file)."
        )


def _data(recipe: Recipe, module: nn.Module, dtype: torch.dtype, device: str) -> Data | None:
    """The calibration inputs, where the recipe reads some or a file is given: it is the probe, too."""
    source = recipe.calibration.source
    if source is None and not recipe.needs():
        return None
    arguments = ", ".join(inspect.signature(module.forward).parameters)
    if source is None or source.suffix.lower() not in TENSOR_SUFFIXES:
        found = "there is none" if source is None else f"{source} is none"
        raise SecateurError(
            f"a module of your own is calibrated on tensors, and {found}: give a .safetensors or .npz file with one tensor "
            f"for each argument of its forward ({arguments}), the first dimension being the sample\n"
            "  (--calibration inputs.safetensors), or use a method that looks at weights alone: --method magnitude."
        )
    wanted = recipe.calibration
    found = inputs.calibration(source, None, samples=wanted.samples, length=wanted.length, seed=wanted.seed)
    batches = [
        {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in b.items()} for b in found.batches
    ]
    return Data(batches, found.description, found.digest, found.tokens)


def _settings(built: Built, build: str, recipe: Recipe) -> dict[str, Any]:
    stat = (built.weights.folder / built.weights.shards[0]).stat()
    return {
        "recipe": recipe.model_dump(mode="json"),
        "build": build,
        "weights": [built.weights.shards[0], stat.st_size, stat.st_mtime_ns],
        "data": "" if built.data is None else built.data.digest,
        "versions": environment(),
    }


def _write(report: Report, built: Built, staging: Staging, weights: Path, progress: Progress) -> None:
    """Put the result together, load it into a fresh module, compare, and only then give it its name."""
    started = time.perf_counter()
    progress("verify", 0, 1, "reload")
    probe = built.data.batches[0] if built.data is not None else None
    expected = None if probe is None else _answer(built.module, probe)
    if expected is not None and not bool(torch.isfinite(expected).all()):
        raise SecateurError("the pruned module gives NaN or Inf on the first calibration input: prune less")
    staging.save("", _pruned_tensors(built), {"layers": len(report.layers)})
    report.protected = built.plan.protected
    size = {"bytes": built.weights.bytes}
    report.measures = {"before": size, "after": size | {"sparsity": report.sparsity}}
    folder = staging.assemble({"README.md": card(report, weights).encode()}, [])
    if weights.name != SINGLE:
        os.replace(folder / weights.name, folder / SINGLE)
    report.verified = _verify(built, folder / SINGLE, probe, expected)
    report.seconds["verify"] = time.perf_counter() - started
    report.peak_memory = peak_memory()
    details = manifest(report, weights, None if expected is None else digest(expected), built.plan.recipe.seed)
    staging.add("secateur.json", json.dumps(details, indent=2, allow_nan=False).encode())
    staging.finish()
    progress("verify", 1, 1, "done")


def _pruned_tensors(built: Built) -> dict[str, Tensor]:
    """Name in the file -> tensor, for whatever shares memory with a pruned parameter. The rest stays as it was."""
    changed = {built.module.get_parameter(s.layer.parameter).data_ptr() for s in built.plan.settings}
    state = built.module.state_dict()
    return {name: state[name] for name in built.weights.entries if state[name].data_ptr() in changed}


def _verify(built: Built, path: Path, probe: Batch | None, expected: Tensor | None) -> dict[str, Any]:
    """Raises SecateurError unless the file gives the module that is in memory, and its answer."""
    state = built.module.state_dict()
    with safe_open(path, framework="pt", device="cpu") as file:
        names = set(file.keys())
        changed = [n for n in names & set(state) if not torch.equal(file.get_tensor(n).to(state[n]), state[n])]
    if names != set(built.weights.entries) or changed:
        raise SecateurError(
            f"{path} does not hold what is in memory ({(changed or sorted(names))[0]}); please report this"
        )
    if probe is None or expected is None:
        return {"how": "every tensor read back and compared", "difference": 0.0, "tolerance": 0.0}
    dtype = str(next(built.module.parameters()).dtype).removeprefix("torch.")
    device = str(next(built.module.parameters()).device)
    again = fresh(built.make, open_file(path), dtype, device)
    apart = difference(expected, _answer(again, probe))
    if not apart <= TOLERANCE:
        raise SecateurError(
            f"a fresh module with the written weights answers differently, by {apart:.2g} of the largest output: it "
            "depends on something that is not in its state dict. The result was not given its name."
        )
    return {"how": "loaded into a fresh module", "difference": apart, "tolerance": TOLERANCE}


def _answer(module: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad(), randomness([]):
        return answer(call(module, batch, **no_cache(module))).detach().float().cpu()


def _file(weights: Checkpoint) -> Path:
    return weights.folder / weights.shards[0]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
