"""Look at a model folder without loading its weights: what can be pruned, what that takes, and what helps for which aim."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from secateur.advice import Advice, Facts, advise
from secateur.errors import SecateurError
from secateur.estimate import Expected, Load, count_weights, expect, text_config
from secateur.machine import check_device, rates
from secateur.memory import available_memory
from secateur.pipeline import HOLDOUT, load_tokenizer, resolve
from secateur.plan import Plan, make_plan
from secateur.prune import GRADIENTS
from secateur.recipe import Calibration, method
from secateur.smaller import look
from secateur.stream.blocks import find_blocks
from secateur.stream.checkpoint import read_json
from secateur.stream.source import Source
from secateur.structure.survey import Survey
from secateur.weights.granularity import parse
from secateur.weights.layers import Layer, all_layers

METHODS = ("magnitude", "wanda", "sparsegpt", "admm", "taylor")  # whose costs are told
PATTERNS = ("2:4", "1:2", "4:8", "1x16", "16x16")


@dataclass(frozen=True)
class Group:
    """Layers of one name, up to the numbers in it, and one shape. pattern: a glob for --protect and --include."""

    pattern: str
    shape: tuple[int, int]
    count: int
    kind: str
    reason: str | None = None  # why it is protected


@dataclass(frozen=True)
class Diagnosis:
    """What `secateur doctor` says. problems: why the folder cannot be pruned; remarks: what is good to know."""

    model: str
    architecture: str
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    bytes: int = 0
    parameters: int = 0
    dtype: str = ""
    computing: str = ""
    share: float = 0.0  # share of the weights that lie in layers that can be pruned
    blocks: tuple[Group, ...] = ()
    layers: tuple[Group, ...] = ()
    protected: tuple[Group, ...] = ()
    names: Mapping[str, str | None] = field(default_factory=dict)  # every matrix -> why it is protected
    patterns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # pattern -> globs that it does not divide
    calibration: Load | None = None
    expected: Mapping[str, Expected] = field(default_factory=dict)
    memory: int = 0  # available
    advice: Mapping[str, tuple[Advice, ...]] = field(default_factory=dict)
    structure: Survey | None = None
    structure_remark: str = ""  # why nothing is known of the structure

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"prunable": not self.problems} | asdict(self)


def diagnose(
    folder: str | Path, calibration: Calibration | None = None, *, device: str = "cpu", dtype: str = "auto"
) -> Diagnosis:
    """Reads the config, the tokenizer and the shards' headers; weights stay on disk. A folder that cannot be pruned is
    told by `problems`. Raises SecateurError when there is no such folder.
    """
    check_device(device)
    folder = resolve(folder)
    wanted = calibration or Calibration()
    try:
        source = Source(folder, dtype, device)
        if hasattr(source.model, "tie_weights"):  # so that what is tied counts once
            source.model.tie_weights()  # type: ignore[operator]
        plan = make_plan(source.model, method("magnitude", sparsity=0.5))
    except SecateurError as error:
        return _cannot(folder, error)
    problems, remarks, causal = _tokenizer(folder, source.model)
    load = Load(wanted.samples, positions(source.model, wanted.length), HOLDOUT if causal else 1)
    protected = groups(_protected(source.model, plan), plan.protected)
    undivided = {pattern: _undivided(pattern, plan) for pattern in PATTERNS}
    parameters = count_weights(source.model)
    share = sum(s.layer.shape[0] * s.layer.shape[1] for s in plan.settings) / max(parameters, 1)
    facts = Facts(source.checkpoint.bytes, parameters, share, not undivided["2:4"])
    structure, remark = _structure(source.model)
    return Diagnosis(
        folder.name,
        type(source.model).__name__,
        tuple(problems),
        (*remarks, *_remarks(source, share)),
        source.checkpoint.bytes,
        parameters,
        _word(source.stored),
        _word(source.dtype),
        share,
        _block_groups(source.model),
        groups([s.layer for s in plan.settings]),
        protected,
        {s.layer.name: None for s in plan.settings} | dict(plan.protected),
        undivided,
        load,
        _expected(source, load),
        available_memory(),
        advise(facts),
        structure,
        remark,
    )


def _structure(skeleton: nn.Module) -> tuple[Survey | None, str]:
    try:
        return look(skeleton), ""
    except SecateurError as error:
        return None, str(error).splitlines()[0]


def _cannot(folder: Path, error: SecateurError) -> Diagnosis:
    """What can be said of a folder that cannot be pruned."""
    try:
        architectures = read_json(folder / "config.json").get("architectures")
    except SecateurError:
        architectures = None
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown"
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
    return Diagnosis(folder.name, name, (str(error),), bytes=size, memory=available_memory())


def _tokenizer(folder: Path, model: nn.Module) -> tuple[list[str], list[str], bool]:
    """Problems, remarks, and whether perplexity can be measured."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        name = getattr(model, "main_input_name", "")
        return [], [f"Takes {name}: methods that read data need --calibration with tensors of that name."], False
    try:
        tokenizer = load_tokenizer(folder)
    except SecateurError as error:
        return [str(error)], [], False
    if tokenizer is None:
        return [], ["No tokenizer: calibration needs token ids as tensors, and perplexity is not measured."], False
    return [], [], "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__


def _remarks(source: Source, share: float) -> list[str]:
    found = []
    if unused := source.naming.unused:
        more = f" and {len(unused) - 1} more" if unused[1:] else ""
        found.append(f"{unused[0]}{more} in the checkpoint belong to no part of the model; they stay as they are.")
    if share < 0.6:
        found.append(
            f"Only {share:.0%} of the weights can be pruned: 50 % zeros in them are {share / 2:.0%} of the model."
        )
    if not find_blocks(source.model):
        found.append("No repeated blocks: the whole model is in memory at once.")
    return found


def _expected(source: Source, load: Load) -> dict[str, Expected]:
    """Method -> memory and time; those that need the loss's gradient only for models that have one."""
    measured = rates(str(source.device), source.dtype)
    found = {}
    for name in METHODS:
        plan = make_plan(source.model, method(name, sparsity=0.5))
        if plan.needs & GRADIENTS and not load.riders > 1:
            continue
        found[name] = expect(source.model, plan, load, source.checkpoint.bytes, source.dtype, measured)
    return found


def positions(model: nn.Module, length: int) -> int:
    """How many positions one calibration window or sample has inside the blocks."""
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", "input_ids") == "input_ids":
        most = getattr(text_config(model), "max_position_embeddings", None)
        return min(length, most) if isinstance(most, int) and most > 0 else length
    image, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(image, int) and isinstance(patch, int):
        return (image // patch) ** 2 + 1
    frames = getattr(config, "max_source_positions", None)
    return frames if isinstance(frames, int) else 256


# Groups of layers


def groups(layers: Iterable[Layer], reasons: Mapping[str, str] | None = None) -> tuple[Group, ...]:
    """Layers whose names differ in numbers only, in the order of their first."""
    counts: dict[tuple[str, tuple[int, int], str, str | None], int] = {}
    for layer in layers:
        key = (pattern_of(layer.name), layer.shape, layer.kind, (reasons or {}).get(layer.name))
        counts[key] = counts.get(key, 0) + 1
    return tuple(Group(name, shape, count, kind, reason) for (name, shape, kind, reason), count in counts.items())


def pattern_of(name: str) -> str:
    """The glob for a layer and all that are like it: numbers become *, the index of an expert goes."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", re.sub(r"\[\d+\]$", "", name))


def _protected(model: nn.Module, plan: Plan) -> list[Layer]:
    found = {layer.name: layer for layer, _ in all_layers(model)}
    return [found[name] for name in plan.protected]


def _undivided(pattern: str, plan: Plan) -> tuple[str, ...]:
    """Globs of the layers that a pattern does not divide."""
    height, width = parse(pattern).divisor
    return tuple(
        dict.fromkeys(
            pattern_of(s.layer.name) for s in plan.settings if s.layer.shape[0] % height or s.layer.shape[1] % width
        )
    )


def _block_groups(model: nn.Module) -> tuple[Group, ...]:
    """Blocks by name and type: shape is (number of matrices, weights)."""
    counts: dict[tuple[str, str, tuple[int, int]], int] = {}
    for name, block in find_blocks(model).items():
        matrices = sum(parameter.ndim >= 2 for parameter in block.parameters())
        key = (pattern_of(name), type(block).__name__, (matrices, sum(p.numel() for p in block.parameters())))
        counts[key] = counts.get(key, 0) + 1
    return tuple(Group(name, shape, count, kind) for (name, kind, shape), count in counts.items())


def _word(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
