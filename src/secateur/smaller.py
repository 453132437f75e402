"""A checkpoint in, a smaller checkpoint out: structure removed, the result verified before it gets its name."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur import data as inputs
from secateur.card import environment
from secateur.data import Batch, Data
from secateur.data.tensors import TENSOR_SUFFIXES
from secateur.errors import SecateurError
from secateur.forward import default_loss, no_cache
from secateur.machine import check_device
from secateur.memory import available_memory, peak_memory
from secateur.pipeline import check_out, load_tokenizer, resolve
from secateur.probe import probe_batches
from secateur.prune import Progress, no_progress
from secateur.recipe import Calibration, Part
from secateur.stream.checkpoint import DTYPES
from secateur.stream.observe import make_observable
from secateur.stream.skeleton import build, check_folder
from secateur.stream.source import Source
from secateur.stream.staging import staging_folder
from secateur.structure import (
    Plan,
    apply_,
    importance,
    plan,
    plan_experts,
    plan_layers,
    plan_sublayers,
    save,
    trace,
)
from secateur.structure.criteria import CRITERIA
from secateur.structure.depth import stacks
from secateur.structure.experts import expert_scores, mixtures
from secateur.structure.planning import ALLOCATIONS
from secateur.structure.saved import write_config
from secateur.structure.selection import LEAST
from secateur.structure.shards import check_shards, cut_checkpoint, tensors_of_source
from secateur.structure.sublayers import KINDS
from secateur.structure.survey import Survey, survey

HOLDOUT = 8  # windows on which a language model is measured before and after
DEPTH = {"layers", "experts", *KINDS}  # what is chosen by running data, and not by width
REPEATS = 7  # of a timed forward, before and after
SMALL = 200_000_000  # parameters of a model that is looked at with random weights


class Smaller(Part):
    """What to remove from a model's structure.

    remove: kind of structure (ffn, heads, hidden, channels, layers, ..) or glob -> share, or number where it is 1 or more.
    target: params, macs or bytes -> the share that may remain.
    """

    remove: dict[str, float] | None = None
    target: dict[str, float] | None = None
    criterion: str | None = None
    allocation: str = "uniform"
    include: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    multiple: int | None = Field(None, ge=1)
    least: float = Field(LEAST, gt=0, le=1)
    steps: int = Field(1, ge=1)
    contiguous: bool = False
    calibration: Calibration = Calibration()
    seed: int = Field(0, ge=0, lt=2**63)
    model: str | None = None
    out: Path | None = None

    @model_validator(mode="after")
    def _checked(self) -> Smaller:
        if (self.remove is None) == (self.target is None):
            raise ValueError("say either what to remove or what may remain (remove, target)")
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}; known for structure: {', '.join(CRITERIA)}")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"unknown allocation {self.allocation!r}; known for structure: {', '.join(ALLOCATIONS)}")
        return self


@dataclass
class Shrunk:
    """What happened to a model. loads_with: stock libraries, or secateur.load."""

    plans: list[Plan]
    loads_with: str
    before: dict[str, Any]
    after: dict[str, Any]
    criterion: str
    calibration: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "before": self.before,
            "after": self.after,
            "loads with": self.loads_with,
            "criterion": self.criterion,
            "calibration": self.calibration,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
            "plans": [found.explain() for found in self.plans],
        }


def remove(
    folder: str | Path,
    wanted: Smaller,
    out: str | Path,
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
    write: bool = True,
    in_memory: bool | None = None,
) -> Shrunk:
    """Remove structure from a Hugging Face model folder into `out`; without `write`, only find out what would remain.

    in_memory: hold the whole model in memory, or cut the checkpoint on its shards, where criteria that run data are not
    to be had; None: as it fits. `out` is whole or absent: it is loaded again and its answers are compared before it
    gets its name. Raises SecateurError for every mistake that can be known before work starts, and when the proof fails.
    """
    started = time.perf_counter()
    folder, out = resolve(folder), Path(out)
    check_out(folder, out)
    check_device(device)
    check_folder(folder)
    skeleton = build(folder, torch.float32)
    examples = _examples(skeleton, wanted.seed)
    if not fits_memory(skeleton) if in_memory is None else not in_memory:
        return _on_shards(folder, wanted, out, examples, progress, write)
    criterion, data, holdout = _data(folder, skeleton, wanted)
    staging = _stage(out) if write else None
    try:
        model = _loaded(folder, type(skeleton), device)
        work = _Work(model, examples, data, holdout, criterion, wanted, progress)
        before = work.measures()
        config, stored = copy.deepcopy(model.config), _stored(folder, model)
        plans = work.cut()
        after = work.measures()
        found = Shrunk(plans, "", before, after, criterion, "none" if data is None else data.description)
        found.seconds = work.seconds
        progress("time", 0, 1, "before and after in turns")
        models = (_loaded(folder, type(skeleton), device), model)
        before["milliseconds"], after["milliseconds"] = _latencies(models, work.example)
        del models
        if staging is None:
            return found
        progress("verify", 0, 1, "reload")
        _round(model, stored)
        found.loads_with = save(model, plans, staging, config, work.checks)
        found.after["bytes"] = sum(path.stat().st_size for path in staging.glob("*.safetensors"))
        found.before["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found.seconds["total"] = time.perf_counter() - started
        found.peak_memory = peak_memory()
        _finish(folder, staging, out, found, wanted)
        progress("verify", 1, 1, "done")
        return found
    except BaseException:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _examples(model: nn.Module, seed: int) -> list[Batch]:
    """Inputs of the right shape, of two lengths: what the model is traced, proven and reloaded on."""
    found = probe_batches(model, seed)
    if not found:
        raise SecateurError(
            f"{type(model).__name__}: its config does not tell what it takes. Trace it in Python, on inputs of yours: "
            "secateur.structure.trace(model, example_inputs)."
        )
    return found


class _Work:
    """The model in memory, and what is done to it."""

    def __init__(
        self,
        model: Any,
        examples: Sequence[Batch],
        data: Data | None,
        holdout: Sequence[Tensor],
        criterion: str,
        wanted: Smaller,
        progress: Progress,
    ) -> None:
        self.model, self.data, self.holdout = model, data, holdout
        self.criterion, self.wanted, self.progress = criterion, wanted, progress
        self.example = {**_first_that_runs(model, examples), **no_cache(model)}
        self.seconds: dict[str, float] = {}

    @property
    def checks(self) -> list[dict[str, Any]]:
        """Inputs on which the reloaded model has to answer as this one: the example, and one of another length."""
        longer = {key: torch.cat([v, v[:, :5]], 1) if key.endswith("ids") else v for key, v in self.example.items()}
        return [self.example, longer]

    @property
    def batches(self) -> list[dict[str, Any]]:
        """What criteria read."""
        return [] if self.data is None else [dict(batch) for batch in self.data.batches]

    def cut(self) -> list[Plan]:
        """Whole blocks first, then widths."""
        plans = []
        ask = dict(self.wanted.remove or {})
        layers = ask.pop("layers", None)
        if layers is not None:
            blocks = sum(len(names) for names in stacks(self.model).values())
            count = round(layers * blocks) if layers < 1 else int(layers)
            plans.append(self._timed("depth", lambda: self._layers(count)))
        parts = {kind: ask.pop(kind) for kind in KINDS if kind in ask}
        if parts:
            plans.append(self._timed("sublayers", lambda: self._sublayers(parts)))
        left = ask.pop("experts", None)
        if left is not None:
            plans.append(self._timed("experts", lambda: self._experts(left)))
        if ask or self.wanted.target:
            plans.append(self._timed("width", lambda: self._widths(ask or None)))
        return plans

    def _layers(self, count: int) -> Plan:
        found = plan_layers(
            self.model,
            self.example,
            count,
            batches=self.batches,
            contiguous=self.wanted.contiguous,
            protect=self.wanted.protect,
        )
        apply_(self.model, found, self.example)
        return found

    def _sublayers(self, parts: Mapping[str, float]) -> Plan:
        found = plan_sublayers(self.model, self.example, parts, batches=self.batches, protect=self.wanted.protect)
        apply_(self.model, found, self.example)
        return found

    def _experts(self, share: float) -> Plan:
        scores = expert_scores(self.model, self.batches or [self.example])
        count = max((mixture.count for mixture in mixtures(self.model)), default=0)
        left = count - (round(share * count) if share < 1 else int(share))
        found = plan_experts(self.model, self.example, left, {n: s["contribution"] for n, s in scores.items()})
        apply_(self.model, found, self.example)
        return found

    def _widths(self, ask: Mapping[str, float] | None) -> Plan:
        wanted = self.wanted
        self.progress("trace", 0, 1, type(self.model).__name__)
        couplings = self._timed("trace", lambda: trace(self.model, self.example))
        self.progress("plan", 0, 1, self.criterion)
        needs = CRITERIA[self.criterion].needs
        found = plan(
            couplings,
            remove=ask,
            target=wanted.target,
            criterion=self.criterion,
            batches=self.batches if needs else (),
            loss=default_loss(self.model) if needs & {"gradient", "fisher"} else None,
            allocation=wanted.allocation,
            include=wanted.include,
            protect=wanted.protect,
            multiple=wanted.multiple,
            least=wanted.least,
            steps=wanted.steps,
            seed=wanted.seed,
        )
        self.progress("cut", 0, 1, found.promise)
        apply_(self.model, found, self.example)
        return found

    def measures(self) -> dict[str, Any]:
        """Size, time of a forward, and perplexity on windows that nothing is learned from."""
        found: dict[str, Any] = {"params": sum(p.numel() for p in self.model.parameters())}
        with torch.no_grad():
            if self.holdout:
                loss = default_loss(self.model)
                losses = [float(loss(self.model, {"input_ids": window})) for window in self.holdout]
                found["perplexity"] = math.exp(min(statistics.fmean(losses), 700))
        return found

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        self.seconds[stage] = time.perf_counter() - started
        return result


def _first_that_runs(model: nn.Module, examples: Sequence[Batch]) -> Batch:
    failures = []
    for batch in examples:
        try:
            with torch.no_grad():
                model(**batch, **no_cache(model))
            return batch
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            failures.append(str(error).split("\n")[0])
    raise SecateurError(f"{type(model).__name__} runs on none of the inputs that its config suggests: {failures[0]}")


def _latencies(models: Sequence[nn.Module], example: Mapping[str, Any]) -> list[float]:
    """Median milliseconds of a forward of each, taken in turns: a machine's speed drifts."""
    seen: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for repeat in range(REPEATS + 1):
            for model, times in zip(models, seen, strict=True):
                started = time.perf_counter()
                model(**example)
                if repeat:  # the first one warms up
                    times.append(1000 * (time.perf_counter() - started))
    return [statistics.median(times) for times in seen]


def _data(folder: Path, model: nn.Module, wanted: Smaller) -> tuple[str, Data | None, list[Tensor]]:
    """The criterion, the calibration data that it reads, and windows of text that nothing is learned from."""
    tokenizer = load_tokenizer(folder)
    writes = any(part in type(model).__name__ for part in ("CausalLM", "LMHead"))
    criterion = wanted.criterion or ("taylor" if writes and tokenizer is not None else "magnitude")
    asked = wanted.calibration
    layers = DEPTH & set(wanted.remove or {})
    holdout = []
    if (
        writes
        and tokenizer is not None
        and (asked.source is None or asked.source.suffix.lower() not in TENSOR_SUFFIXES)
    ):
        holdout = inputs.holdout(
            asked.source,
            tokenizer,
            samples=asked.samples,
            length=asked.length,
            count=HOLDOUT,
            seed=asked.seed,
            field=asked.field,
        )
    if not CRITERIA[criterion].needs and not layers and asked.source is None:
        return criterion, None, holdout
    if asked.source is None and (tokenizer is None or not writes):
        if not CRITERIA[criterion].needs:
            return criterion, None, holdout
        raise SecateurError(
            f"the criterion {criterion} reads data: give --calibration, a .safetensors or .npz file with one tensor for "
            "each argument of the model, or choose --criterion magnitude."
        )
    found = inputs.calibration(
        asked.source,
        tokenizer,
        samples=asked.samples,
        length=asked.length,
        seed=asked.seed,
        field=asked.field,
        encoder_decoder=bool(getattr(model.config, "is_encoder_decoder", False)),  # type: ignore[union-attr]
    )
    return criterion, found, holdout


def fits_memory(model: nn.Module) -> bool:
    """Whether the model can be held in float32, and most of it a second time for the proof."""
    return 2.5 * 4 * sum(p.numel() for p in model.parameters()) < available_memory()


def _on_shards(
    folder: Path, wanted: Smaller, out: Path, examples: Sequence[Batch], progress: Progress, write: bool
) -> Shrunk:
    """Trace and prove on the meta device, score and cut one tensor after the other."""
    started = time.perf_counter()
    criterion = wanted.criterion or "magnitude"
    whole = sorted(DEPTH & set(wanted.remove or {}))
    if CRITERIA[criterion].needs or whole:
        what = f"removing {whole[0]}" if whole else f"the criterion {criterion}"
        raise SecateurError(
            f"{what} needs the whole model in memory, and it does not fit: --criterion magnitude works on the shards"
        )
    source = Source(folder, "auto", "cpu")
    model = _without_memory(source.model)
    progress("trace", 0, 1, type(model).__name__)
    example = {**examples[0], **no_cache(model)}
    couplings = trace(model, example)
    progress("score", 0, 1, criterion)
    scores = importance(couplings, criterion, seed=wanted.seed, tensors=tensors_of_source(source))
    found = plan(
        couplings,
        remove=wanted.remove,
        target=wanted.target,
        scores=scores,
        allocation=wanted.allocation,
        include=wanted.include,
        protect=wanted.protect,
        multiple=wanted.multiple,
        least=wanted.least,
    )
    size = source.checkpoint.bytes
    result = Shrunk(
        [found],
        "",
        {"params": found.before["params"], "bytes": size},
        {"params": found.after["params"]},
        criterion,
        "none",
    )
    if not write:
        return result
    staging = _stage(out)
    try:
        progress("cut", 0, 1, found.promise)
        cut_checkpoint(source, found, staging)
        result.loads_with = write_config(model, found, folder, staging)
        progress("verify", 0, 1, "shards")
        check_shards(source, found, staging)
        result.after["bytes"] = sum(path.stat().st_size for path in staging.glob("*.safetensors"))
        result.seconds = {"total": time.perf_counter() - started}
        result.peak_memory = peak_memory()
        _finish(folder, staging, out, result, wanted)
        return result
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def look(skeleton: nn.Module, seed: int = 0) -> Survey:
    """What can be removed from the model of a config. Its weights do not matter: random ones do for a small model, and none
    for a large one.
    """
    small = sum(p.numel() for p in skeleton.parameters()) < SMALL
    if small:
        model = type(skeleton)._from_config(copy.deepcopy(skeleton.config), dtype=torch.float32).eval()  # type: ignore
        make_observable(model)
        example = _first_that_runs(model, _examples(model, seed))
    else:
        model = _without_memory(skeleton)
        example = _examples(model, seed)[0]
    return survey(trace(model, {**example, **no_cache(model)}))


def _without_memory(skeleton: nn.Module) -> nn.Module:
    """The same model, buffers and all, on the meta device."""
    with torch.device("meta"):
        model = type(skeleton)._from_config(skeleton.config)  # type: ignore[attr-defined]
    model.tie_weights()
    return model.eval()


def _loaded(folder: Path, kind: Any, device: str) -> Any:
    """The model in float32."""
    model = kind.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    make_observable(model)
    return model


def _stored(folder: Path, model: nn.Module) -> dict[int, torch.dtype]:
    """Identity of a parameter -> what the checkpoint stores it as."""
    source = Source(folder, "auto", "cpu")
    found = {}
    for group in source.naming.groups.values():
        entry = source.checkpoint.entries[group.sources[0][0]]
        found |= dict.fromkeys(group.members, DTYPES[entry.dtype])
    return {id(p): found[name] for name, p in model.named_parameters(remove_duplicate=False) if name in found}


def _round(model: nn.Module, stored: Mapping[int, torch.dtype]) -> None:
    """Parameters as they are stored; buffers that no checkpoint has keep what they were computed in."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored.get(id(parameter), parameter.dtype))


def _stage(out: Path) -> Path:
    """A folder for the unfinished result."""
    staging = staging_folder(out)
    if os.path.lexists(staging):
        raise SecateurError(f"{staging} holds an unfinished run; delete that folder, or choose another --out")
    staging.mkdir(parents=True)
    return staging


def _finish(folder: Path, staging: Path, out: Path, found: Shrunk, wanted: Smaller) -> None:
    """Whatever else belongs to a model, the card, and the name."""
    for name in Source(folder, "auto", "cpu").other_files():
        if not (staging / name).exists():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, staging / name)
    manifest = json.loads((staging / "secateur.json").read_text(encoding="utf-8"))
    manifest["versions"] = environment()
    manifest["recipe"] = wanted.model_dump(mode="json", exclude_none=True)
    manifest["measures"] = {"before": found.before, "after": found.after}
    manifest["seconds"], manifest["peak_memory_bytes"] = found.seconds, found.peak_memory
    (staging / "secateur.json").write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(staging, out)
