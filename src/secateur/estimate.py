"""What a run will take in memory and time, from shapes alone. Rough by design: right to a factor of two.

Memory is the highest of the phases of a run, above what Python, its libraries and the tokenizer take (PROCESS):

    block      the largest block's weights, its Gram matrices, the temporaries of its largest layer, one window passing
    head       the output head and the logits of one window, where perplexity or a probe is computed
    embedding  the input table
    reload     the whole result, as stock transformers loads it for verification (small results only)
    gradients  the whole model with the gradients of the loss (taylor, fisher, obd only)

to each of which the activations of all calibration windows are added: they wait at the entry of a block.

Time is counted in floating-point operations, each kind at the rate that this machine was measured to have, plus START.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from secateur.machine import Rates
from secateur.pipeline import HOLDOUT, RELOAD_WHOLE
from secateur.plan import Plan, Setting, needs_scores
from secateur.prune import GRADIENTS
from secateur.stream.source import HEAVY
from secateur.weights.layers import Layer

PROCESS = 320 << 20  # bytes
START = 5.0  # seconds to import the libraries and to read the text
ITERATIONS = {"admm": 35, "refit": 120}  # typical numbers of passes over a layer, each two products
EFFICIENCY = 0.75  # of the measured rate of products, reached by whole models
POLISH = 15  # conjugate gradient steps at the end of admm
DISK = 400e6  # bytes per second, assumed
WIDE = 1024  # inputs from which on half of a Gram matrix is computed and mirrored


@dataclass(frozen=True)
class Load:
    """What passes through the model: windows of `positions` each, `riders` of them only to be measured."""

    windows: int
    positions: int
    riders: int = HOLDOUT


@dataclass(frozen=True)
class Expected:
    """memory: bytes of the whole process; phases: what its peak would be in each. seconds and their stages."""

    memory: int
    seconds: float
    phases: Mapping[str, int] = field(default_factory=dict)
    stages: Mapping[str, float] = field(default_factory=dict)


def expect(model: nn.Module, plan: Plan, load: Load, stored_bytes: int, dtype: torch.dtype, rates: Rates) -> Expected:
    """model: its parameters may be on the meta device. stored_bytes: size of the checkpoint; dtype: of computing."""
    phases = memory_phases(model, plan, load, stored_bytes, dtype.itemsize)
    stages = time_stages(model, plan, load, stored_bytes, rates)
    return Expected(max(phases.values()), sum(stages.values()), phases, stages)


# Memory


def memory_phases(model: nn.Module, plan: Plan, load: Load, stored_bytes: int, size: int) -> dict[str, int]:
    """Peak of the process in each phase, in bytes. size: bytes of a number in computing."""
    config = text_config(model)
    hidden = _number(config, "hidden_size", 0) or max((s.layer.shape[1] for s in plan.settings), default=0)
    passing = _wide(plan) * 4 * load.positions * size
    waiting = (load.windows + load.riders) * load.positions * (hidden + 2 * _head_size(config, hidden)) * size
    outside, tables = _outside(model, plan, size)
    always = PROCESS + outside + waiting
    logits = 3 * 4 * load.positions * _number(config, "vocab_size", 0) if load.riders else 0
    whole = count_weights(model)
    phases = {
        "block": always + passing + max((_block(plan, name, size) for name in plan.blocks), default=0),
        "head": always + tables.get("output", 0) + logits,
        "embedding": always + tables.get("input", 0),
    }
    if stored_bytes <= RELOAD_WHOLE:
        phases["reload"] = always + whole * size
    if plan.needs & GRADIENTS:
        graph = load.positions * size * sum(s.layer.shape[0] + s.layer.shape[1] for s in plan.settings)
        phases["gradients"] = PROCESS + whole * size + pruned_weights(plan) * (size + 8) + graph + 2 * logits
    return phases


def _block(plan: Plan, name: str, size: int) -> int:
    settings = plan.within(name)
    grams = sum(4 * width**2 * groups for width, groups in distinct_inputs(settings)) if "gram" in plan.needs else 0
    weights = sum(parameter.numel() for parameter in plan.blocks[name].parameters()) * size
    return weights + grams + max((_temporaries(setting) for setting in settings), default=0)


def _temporaries(setting: Setting) -> int:
    """What one layer's update needs beside its weights and its Gram matrix: float32 copies of both."""
    out, width = setting.layer.shape
    matrices, grams = {"none": (6, 0), "sparsegpt": (6, 2), "refit": (10, 1), "admm": (11, 4)}.get(
        setting.update, (8, 2)
    )
    if "gram" in setting.needs and setting.update == "none":
        grams = 2
    return 4 * (matrices * out * width + grams * width**2)


def _outside(model: nn.Module, plan: Plan, size: int) -> tuple[int, dict[str, int]]:
    """Bytes outside the blocks that stay, and those of the heavy tables, which are there only while they are used."""
    inside = {id(parameter) for block in plan.blocks.values() for parameter in block.parameters()}
    stays, tables = 0, {}
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in inside]
        held = sum(parameter.numel() for parameter in own) * size
        if isinstance(module, (nn.Embedding, nn.Linear)) and held > HEAVY:
            place = "input" if isinstance(module, nn.Embedding) else "output"
            tables[place] = tables.get(place, 0) + held
        else:
            stays += held
    return stays, tables


# Time


def time_stages(model: nn.Module, plan: Plan, load: Load, stored_bytes: int, rates: Rates) -> dict[str, float]:
    """Seconds per stage."""
    windows = load.windows if reads_data(plan) else 0
    tokens, riding = windows * load.positions, load.riders * load.positions
    forward = forward_flops(model, plan, load.positions)
    passes = 2 * tokens * (2 if needs_scores(plan) else 1) + 2 * riding
    head = 2 * 2 * riding * _number(text_config(model), "vocab_size", 0) * _number(text_config(model), "hidden_size", 0)
    rates = replace(rates, product=EFFICIENCY * rates.product)
    stages = {"start": START, "forward": (forward * passes + head) / rates.product}
    if "gram" in plan.needs:
        stages["statistics"] = sum(_gram_flops(plan, name, tokens) for name in plan.blocks) / rates.product
    if plan.needs & GRADIENTS:
        times = 5 + (6 * plan.recipe.probes if "curvature" in plan.needs else 0)
        stages["gradients"] = times * tokens * forward / rates.product
    stages["solve"] = sum(_solve(setting, rates) for setting in plan.settings) + _factors(plan, rates)
    stages["disk"] = 3 * stored_bytes / DISK
    return stages


def reads_data(plan: Plan) -> bool:
    """Whether calibration windows pass through the model at all."""
    return bool(plan.recipe.needs())


def forward_flops(model: nn.Module, plan: Plan, positions: int) -> float:
    """Of one position passing through the blocks: two per weight that it meets, and the attention scores."""
    config = text_config(model)
    active = sum(
        parameter.numel() * _share(config, module, parameter)
        for block in plan.blocks.values()
        for module in block.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim >= 2
    )
    return 2 * active + 4 * len(plan.blocks) * positions * _number(config, "hidden_size", 0)


def _share(config: Any, module: nn.Module, parameter: nn.Parameter) -> float:
    """The share of positions that a weight sees: top-k of all experts for stacked ones."""
    if parameter.ndim != 3 or isinstance(module, nn.modules.conv._ConvNd):
        return 1.0
    return min(1.0, _number(config, "num_experts_per_tok", 2) / parameter.shape[0])


def _gram_flops(plan: Plan, name: str, tokens: int) -> float:
    settings = plan.within(name)
    experts = sum(s.layer.kind == "expert" for s in settings)
    each = {s.layer.parameter: 0 for s in settings if s.layer.kind == "expert"}
    stacked = experts / len(each) if each else 1
    total = 0.0
    for width, groups in distinct_inputs([s for s in settings if s.layer.kind != "expert"]):
        total += groups * tokens * width**2 * (1 if width >= WIDE else 2)
    for width, _ in distinct_inputs([s for s in settings if s.layer.kind == "expert"]):
        total += min(1.0, 2 / stacked) * tokens * width**2 * (1 if width >= WIDE else 2)
    return total


def _factors(plan: Plan, rates: Rates) -> float:
    """Seconds for what is computed once per distinct input: an inverse factor, or eigenvectors."""
    total = 0.0
    for update, cost in (("admm", 1 / rates.eigen), ("sparsegpt", 2 / rates.product), ("none", 2 / rates.product)):
        for name in plan.blocks:
            users = [s for s in plan.within(name) if s.update == update and "gram" in s.needs]
            total += sum(width**3 * groups * cost for width, groups in distinct_inputs(users))
    return total


def _solve(setting: Setting, rates: Rates) -> float:
    """Seconds for one layer, without what it shares with others."""
    out, width = setting.layer.shape
    weights, product = out * width, 2 * out * width**2
    choices, products, inverses = 1.0, 0.0, 0.0
    if setting.update == "sparsegpt":
        products = 1.0
    elif setting.update == "refit":
        products = ITERATIONS["refit"]
    elif setting.update == "admm":
        choices, products, inverses = ITERATIONS["admm"], ITERATIONS["admm"] + POLISH + 4, ITERATIONS["admm"] / 3
    return choices * 2 * weights / rates.choice + (products * product + inverses * 2 * width**3) / rates.product


# Shapes


def distinct_inputs(settings: Sequence[Setting]) -> list[tuple[int, int]]:
    """(width, groups) of the inputs that a block's layers see, from the module tree: layers of one module and width share
    theirs (q, k, v; gate, up), except the last layer of a module with several, which is fed by the others.
    """
    found: dict[Any, tuple[int, int]] = {}
    for setting in settings:
        layer = setting.layer
        found[_input_key(layer, [s.layer for s in settings])] = (layer.shape[1], layer.groups)
    return list(found.values())


def _input_key(layer: Layer, layers: Iterable[Layer]) -> tuple[Any, ...]:
    if layer.kind != "linear":
        return (layer.name,)
    parent = layer.parameter.rsplit(".", 2)[0]
    siblings = [
        other.name for other in layers if other.kind == "linear" and other.parameter.rsplit(".", 2)[0] == parent
    ]
    last = len(siblings) > 1 and siblings[-1] == layer.name
    return (layer.name,) if last else (parent, layer.shape[1])


def text_config(model: nn.Module) -> Any:
    """The configuration of the language part; None for a module without one."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config  # type: ignore[union-attr]


def count_weights(model: nn.Module) -> int:
    """All parameters, those that are to be tied once, whether they are tied yet or not."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return sum(parameter.numel() for name, parameter in model.named_parameters() if name not in tied)


def pruned_weights(plan: Plan) -> int:
    """How many weights stand in the layers to prune."""
    return sum(s.layer.shape[0] * s.layer.shape[1] for s in plan.settings)


def _number(config: Any, name: str, otherwise: int) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else otherwise


def _head_size(config: Any, hidden: int) -> int:
    return _number(config, "head_dim", 0) or hidden // max(1, _number(config, "num_attention_heads", 8))


def _wide(plan: Plan) -> int:
    return max((max(s.layer.shape) for s in plan.settings), default=0)
