"""What a method sees when masks are chosen anew: where the schedule is, and every layer as it is now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur.plan import Plan, Setting, needs_scores
from secateur.training.masks import Masks, named, whole
from secateur.training.schedules import Schedule
from secateur.weights.allocation import Summary, allocate, summarize
from secateur.weights.criteria import CRITERIA
from secateur.weights.stats import Stats

Keeps = Mapping[str, Tensor]  # layer -> keep mask [out, in]
LITTLE = 1e-6  # a final sparsity so small that every schedule is the same share of it


@dataclass
class Live:
    """A layer in training. weight, keep: [out, in]; gradient of the last step, where there is one; memory: what the method
    keeps of the layer, [out, in] each.
    """

    setting: Setting
    shape: tuple[int, ...]  # the parameter's own
    weight: Tensor
    gradient: Tensor | None
    keep: Tensor
    memory: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.setting.layer.name


def live(model: nn.Module, plan: Plan, masks: Masks, memory: Mapping[str, dict[str, Tensor]]) -> list[Live]:
    """The layers of a plan as they are now; whole ones, where a model is sharded."""
    parameters = dict(named(model))
    found = []
    for setting in plan.settings:
        layer, parameter = setting.layer, parameters[setting.layer.parameter]
        shape = tuple(parameter.shape) if layer.index is None else tuple(parameter.shape[1:])
        weight = layer.matrix(whole(parameter.detach()))
        gradient = None if parameter.grad is None else layer.matrix(whole(parameter.grad))
        mask = masks.keep.get(layer.parameter)
        keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else layer.matrix(mask)
        found.append(Live(setting, shape, weight, gradient, keep, memory.get(layer.name, {})))
    return found


def by_parameter(model: nn.Module, layers: Sequence[Live], keeps: Keeps) -> dict[str, Tensor]:
    """Masks of layers as masks of the parameters that they lie in."""
    parameters, found = dict(named(model)), {}
    for layer in layers:
        name = layer.setting.layer.parameter
        if name not in found:
            found[name] = torch.ones(parameters[name].shape, dtype=torch.bool, device=parameters[name].device)
        layer.setting.layer.write_(found[name], keeps[layer.name])
    return found


@dataclass(frozen=True)
class Moment:
    """progress: 0..1 from the schedule's begin to its end. number: how many times masks were chosen before. calibrated: by
    the recipe at a sparsity, where its criterion reads what no training step has.
    """

    plan: Plan
    layers: Sequence[Live]
    schedule: Schedule
    progress: float
    number: int
    calibrated: Callable[[Schedule, float], Keeps] | None = None

    def generator(self, layer: Live) -> torch.Generator:
        """Random numbers of the layer's own, other ones each time, the same on every rank."""
        return torch.Generator().manual_seed(
            (layer.setting.seed(self.plan.recipe.seed) + 1000003 * self.number) % 2**63
        )

    def by_recipe(self) -> Keeps:
        """Keep masks by the recipe's criterion, at the sparsity that the schedule asks for now."""
        if self.calibrated is not None:
            return self.calibrated(self.schedule, self.progress)
        return self.choose({layer.name: self._score(layer) for layer in self.layers})

    def _score(self, layer: Live) -> Tensor:
        stats = Stats(seed=layer.setting.seed(self.plan.recipe.seed), samples=1, rows=layer.weight.shape[0])
        if layer.gradient is not None:
            stats.gradient, stats.gradient_squares = layer.gradient, layer.gradient.square()
        return CRITERIA[layer.setting.criterion].score(layer.weight, stats)

    def choose(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep masks at the sparsity that the schedule asks for now: the lowest scores go."""
        sparsities = self._sparsities(scores)
        return {layer.name: self._keep(layer, scores[layer.name], sparsities[layer.name]) for layer in self.layers}

    def _sparsities(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        recipe = self.plan.recipe
        found = {layer.name: self.schedule(self.progress, layer.setting.sparsity) for layer in self.layers}
        free = [layer for layer in self.layers if not layer.setting.fixed]
        if recipe.allocation == "uniform" or recipe.sparsity is None or not free:
            return found
        summaries = [
            summarize(layer.name, layer.shape, layer.setting.block, scores[layer.name].clamp(min=0), recipe.allocation)
            if needs_scores(self.plan)
            else Summary(layer.name, layer.shape, layer.setting.block)
            for layer in free
        ]
        return found | allocate(recipe.allocation, summaries, self.schedule(self.progress, recipe.sparsity))

    def _keep(self, layer: Live, scores: Tensor, sparsity: float) -> Tensor:
        setting = layer.setting
        choose = setting.choose(float(layer.weight[layer.keep].std()) if int(layer.keep.sum()) > 1 else 0.0)
        if choose.threshold is not None:
            share = self.schedule(self.progress, LITTLE) / LITTLE
            return replace(choose, threshold=choose.threshold * share)(scores)
        if setting.granularity.kind != "n:m":
            return replace(choose, sparsity=sparsity)(scores)
        return _some_groups(choose(scores), scores, setting.granularity.m, sparsity / setting.sparsity)


def _some_groups(keep: Tensor, scores: Tensor, size: int, share: float) -> Tensor:
    """A pattern in a share of its groups: those that lose the least by it first."""
    lost = (scores * ~keep).reshape(-1, size).sum(1)
    count = round(share * len(lost))
    there = torch.zeros(len(lost), dtype=torch.bool, device=keep.device)
    there[lost.argsort(stable=True)[:count]] = True
    return keep | ~there.repeat_interleave(size).reshape(keep.shape)
