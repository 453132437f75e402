"""From a recipe and a model to what will happen to each layer. Mistakes that can be seen without data are found here."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from secateur.errors import SecateurError
from secateur.recipe import Override, Recipe, Threshold, check
from secateur.stream.blocks import find_blocks
from secateur.weights.allocation import NEEDS_SCORES, Summary, allocate
from secateur.weights.criteria import CRITERIA
from secateur.weights.granularity import Choose, Granularity, parse
from secateur.weights.layers import Layer, find_layers, matches, no_match
from secateur.weights.update import UPDATES

FEW = 0.05  # of the prunable weights: layers that a pattern does not divide are protected if they hold no more


@dataclass(frozen=True)
class Setting:
    """How one layer is pruned."""

    layer: Layer
    block: str
    criterion: str
    update: str
    granularity: Granularity
    sparsity: float
    threshold: Threshold | None
    fixed: bool  # by an override: no allocation changes it

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that its criterion and update read."""
        return CRITERIA[self.criterion].needs | UPDATES[self.update].needs

    def choose(self, deviation: float) -> Choose:
        """The choice for this layer; deviation: standard deviation of its weights."""
        threshold = None
        if self.threshold is not None:
            sigma = self.threshold.sigma
            threshold = self.threshold.absolute if sigma is None else sigma * deviation
        return Choose(self.granularity, self.sparsity, threshold)

    def seed(self, seed: int) -> int:
        """A seed of the layer's own, the same wherever and whenever it is pruned."""
        return seed + zlib.crc32(self.layer.name.encode())


@dataclass(frozen=True)
class Plan:
    """blocks: in the order of pruning ("" is the whole model); settings: per layer; protected: name -> reason."""

    recipe: Recipe
    blocks: Mapping[str, nn.Module]
    settings: Sequence[Setting]
    protected: Mapping[str, str]

    def within(self, block: str) -> list[Setting]:
        """The layers of a block."""
        return [setting for setting in self.settings if setting.block == block]

    @property
    def needs(self) -> frozenset[str]:
        """The statistics that some layer reads."""
        return frozenset().union(*(setting.needs for setting in self.settings))


def make_plan(model: nn.Module, recipe: Recipe) -> Plan:
    """Raises SecateurError when nothing can be pruned, a glob matches nothing, or a pattern does not divide some layers."""
    blocks = find_blocks(model)
    found = find_layers(model, blocks, recipe.protect, recipe.include)
    if not found.layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(found.protected.items())[:5])
        raise SecateurError(f"nothing to prune: {reasons or 'the model has no weight matrices'}")
    names = [layer.name for layer in found.layers]
    for override in recipe.overrides:
        if not any(matches(name, [override.match]) for name in names):
            raise SecateurError(f"overrides: {_unmatched(override.match, names, found.protected)}")
    homes = blocks or {"": model}
    settings = [_setting(recipe, layer, _home(layer, homes)) for layer in found.layers]
    settings, undivided = _divided(settings, recipe.include)
    outside = {s.block: model.get_submodule(s.block) for s in settings if s.block not in homes}
    return Plan(recipe, {**homes, **outside}, settings, {**found.protected, **undivided})


def _unmatched(pattern: str, names: list[str], protected: Mapping[str, str]) -> str:
    for name, reason in protected.items():
        if matches(name, [pattern]):
            return f"{pattern!r} matches only what is protected ({name}: {reason}); add it to include"
    return no_match(pattern, names)


def _home(layer: Layer, blocks: Mapping[str, nn.Module]) -> str:
    """The block that a layer lies in, or else its own module."""
    for name in blocks:
        if not name or layer.parameter.startswith(f"{name}."):
            return name
    return layer.parameter.rpartition(".")[0]


def _setting(recipe: Recipe, layer: Layer, block: str) -> Setting:
    chosen = recipe
    fixed = False
    for override in recipe.overrides:
        if matches(layer.name, [override.match]):
            chosen, fixed = _overridden(chosen, override), True
    granularity = parse(chosen.granularity)
    sparsity = 1 - granularity.n / granularity.m if granularity.kind == "n:m" else chosen.sparsity or 0.0
    return Setting(layer, block, chosen.criterion, chosen.update, granularity, sparsity, chosen.threshold, fixed)


def _overridden(recipe: Recipe, override: Override) -> Recipe:
    changes = override.model_dump(exclude_none=True, exclude={"match"})
    if override.threshold is not None:
        changes |= {"threshold": override.threshold, "sparsity": None}
    if override.sparsity is not None:
        changes |= {"threshold": None}
        if ":" in recipe.granularity and override.granularity is None:
            changes |= {"granularity": "layer"}
    if override.granularity is not None and ":" in override.granularity:
        changes |= {"sparsity": None, "threshold": None}
    changed = recipe.model_copy(update={"allocation": "uniform", **changes})
    try:
        check(changed)
    except SecateurError as error:
        raise SecateurError(f"override {override.match!r}: {error}") from None
    return changed


def _divided(settings: list[Setting], include: Sequence[str]) -> tuple[list[Setting], dict[str, str]]:
    """The settings whose patterns divide their layers, and why the others are protected: few weights that do not matter.

    Raises SecateurError when they are more than a few, or asked for by name.
    """
    apart = {s.layer.name: reason for s in settings if (reason := undivided(s))}
    weights = {s.layer.name: math.prod(s.layer.shape) for s in settings}
    few = sum(weights[name] for name in apart) <= FEW * sum(weights.values())
    for setting in settings:
        name, (out, width) = setting.layer.name, setting.layer.shape
        if name in apart and not (few and not setting.fixed and not matches(name, include)):
            known = ((1, 2), (2, 4), (2, 5), (3, 6), (4, 8)) if setting.granularity.kind == "n:m" else ()
            some = [f"{n}:{m}" for n, m in known if width % m == 0]
            others = f" ({len(apart) - 1} more layers are like it)" if len(apart) > 1 else ""
            raise SecateurError(
                f"{name} has shape {[out, width]}; pattern {setting.granularity} needs a {apart[name]}{others}.\n"
                f"  Protect it with  --protect '{name}'"
                + (f"  or choose a pattern that divides {width} ({', '.join(some)})." if some else ".")
            )
    reasons = {
        s.layer.name: f"pattern {s.granularity} needs a {apart[n]}" for s in settings if (n := s.layer.name) in apart
    }
    return [s for s in settings if s.layer.name not in apart], reasons


def undivided(setting: Setting) -> str | None:
    """What the layer's shape would have to be for its pattern; None when it is."""
    (out, width), (height, across) = setting.layer.shape, setting.granularity.divisor
    for found, needed, what in ((width, across, "inputs"), (out, height, "outputs")):
        if found % needed:
            return f"multiple of {needed} {what}"
    return None


def allocated(plan: Plan, summaries: Sequence[Summary]) -> dict[str, float]:
    """Layer name -> sparsity by the recipe's allocation; layers with an override keep theirs."""
    recipe = plan.recipe
    assert recipe.sparsity is not None
    return allocate(recipe.allocation, summaries, recipe.sparsity)


def needs_scores(plan: Plan) -> bool:
    """Whether the allocation has to see scores before anything is pruned."""
    return plan.recipe.allocation in NEEDS_SCORES


def with_sparsities(plan: Plan, sparsities: Mapping[str, float]) -> Plan:
    """The plan with the allocation's answer."""
    settings = [
        replace(s, sparsity=sparsities[s.layer.name]) if s.layer.name in sparsities else s for s in plan.settings
    ]
    return replace(plan, settings=settings)
