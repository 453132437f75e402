"""What a method sees when masks are chosen anew: where the schedule is, and every layer as it is now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.plan import Plan, Setting, needs_scores
from secateur.training.masks import Masks, named, whole
from secateur.training.schedules import Schedule
from secateur.weights.allocation import Summary, allocate, summarize
from secateur.weights.criteria import CRITERIA
from secateur.weights.layers import Layer
from secateur.weights.stats import Stats

Keeps = Mapping[str, Tensor]  # layer -> keep mask [out, in]
LITTLE = 1e-6  # a final sparsity so small that every schedule is the same share of it


@dataclass
class Live:
    """A layer in training. weight, keep: [out, in]; gradient of the last step, where there is one; given: what a run that
    began with masks may ever keep; memory: what the method keeps of the layer, [out, in] each; deviation: the standard
    deviation of its weights before anything was pruned; rate: its learning rate.
    """

    setting: Setting
    shape: tuple[int, ...]  # the parameter's own
    weight: Tensor
    gradient: Tensor | None
    keep: Tensor
    given: Tensor | None
    memory: dict[str, Tensor]
    deviation: float
    rate: float = 0.0

    @property
    def name(self) -> str:
        return self.setting.layer.name


def live(
    model: nn.Module,
    plan: Plan,
    masks: Masks,
    deviations: Mapping[str, float],
    *,
    given: Masks | None = None,
    memory: Mapping[str, dict[str, Tensor]] | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[Live]:
    """The layers of a plan as they are now; whole ones, where a model is sharded. rates: by parameter."""
    parameters = dict(named(model))
    found = []
    for setting in plan.settings:
        layer, parameter = setting.layer, parameters[setting.layer.parameter]
        shape = tuple(parameter.shape) if layer.index is None else tuple(parameter.shape[1:])
        weight = layer.matrix(whole(parameter.detach()))
        gradient = None if parameter.grad is None else layer.matrix(whole(parameter.grad))
        own = (memory or {}).get(layer.name, {})
        keep = _of(masks, layer)
        keep = torch.ones_like(weight, dtype=torch.bool) if keep is None else keep
        may = None if given is None else _of(given, layer)
        rate = (rates or {}).get(layer.parameter, 0.0)
        found.append(Live(setting, shape, weight, gradient, keep, may, own, deviations[layer.name], rate))
    return found


def _of(masks: Masks, layer: Layer) -> Tensor | None:
    mask = masks.keep.get(layer.parameter)
    return None if mask is None else layer.matrix(mask)


def deviations(model: nn.Module, plan: Plan) -> dict[str, float]:
    """Layer -> standard deviation of its weights, which thresholds in sigma count in: once for all, since what is left
    after a cut has a larger one.
    """
    parameters, found = dict(named(model)), {}
    for setting in plan.settings:
        sigma = setting.threshold is not None and setting.threshold.sigma is not None
        weight = setting.layer.matrix(whole(parameters[setting.layer.parameter].detach())) if sigma else None
        found[setting.layer.name] = 0.0 if weight is None or weight.numel() < 2 else float(wide(weight).std())
    return found


def wide(values: Tensor) -> Tensor:
    """In float32 what has half as many bits, to be scored, sorted and summed in."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


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

    @property
    def begun(self) -> bool:
        """Whether there are masks already, chosen or given."""
        given = any(layer.given is not None for layer in self.layers)  # also where they keep everything
        return self.number > 0 or given or not all(bool(layer.keep.all()) for layer in self.layers)

    def by_recipe(self) -> Keeps:
        """Keep masks by the recipe's criterion, at the sparsity that the schedule asks for now."""
        if self.calibrated is not None:
            found = self.calibrated(self.schedule, self.progress)
            return {layer.name: _within(layer, self._so_far(layer, found[layer.name])) for layer in self.layers}
        return self.choose({layer.name: self._score(layer) for layer in self.layers})

    def _so_far(self, layer: Live, keep: Tensor) -> Tensor:
        """A pattern N:M is calibrated as a whole; groups get it by the weights that they lose."""
        setting = layer.setting
        if setting.granularity.kind != "n:m":
            return keep
        share = self.schedule(self.progress, setting.sparsity) / setting.sparsity
        return _some_groups(keep, wide(layer.weight).abs(), setting.granularity.m, share)

    def _score(self, layer: Live) -> Tensor:
        stats = Stats(seed=layer.setting.seed(self.plan.recipe.seed), samples=1, rows=layer.weight.shape[0])
        if layer.gradient is None and layer.setting.needs & {"gradient", "fisher"}:
            raise SecateurError(
                f"{layer.name} has no gradient in this step, which the criterion {layer.setting.criterion} reads: it is "
                "frozen or not used. Protect it, or give calibration batches (data=..., loss=...)"
            )
        if layer.gradient is not None:
            gradient = wide(layer.gradient)
            stats.gradient, stats.gradient_squares = gradient, gradient.square()
        return CRITERIA[layer.setting.criterion].score(wide(layer.weight), stats)

    def choose(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keep masks at the sparsity that the schedule asks for now: the lowest scores go, and what was not given."""
        scores = {layer.name: _within(layer, scores[layer.name]) for layer in self.layers}
        sparsities = self.sparsities(scores)
        return {x.name: _within(x, self._keep(x, scores[x.name], sparsities[x.name])) for x in self.layers}

    def sparsities(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """Layer -> share that goes now, by the recipe's allocation. Raises SecateurError when that would empty layers."""
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
        choose = setting.choose(layer.deviation)
        if choose.threshold is not None:
            share = self.schedule(self.progress, LITTLE) / LITTLE
            return replace(choose, threshold=choose.threshold * share)(scores)
        if setting.granularity.kind != "n:m":
            return replace(choose, sparsity=sparsity)(scores)
        return _some_groups(choose(scores), scores, setting.granularity.m, sparsity / setting.sparsity)


def check_reachable(plan: Plan, layers: Sequence[Live], schedule: Schedule) -> None:
    """Raises SecateurError when the allocation refuses what the schedule ends at."""
    if plan.recipe.allocation != "uniform":
        ending = Moment(plan, layers, schedule, 1.0, 0)
        ending.sparsities({layer.name: wide(layer.weight).abs() for layer in layers})


def _within(layer: Live, values: Tensor) -> Tensor:
    """Nothing where a run that began with masks may keep nothing."""
    return values if layer.given is None else values * layer.given


def _some_groups(keep: Tensor, scores: Tensor, size: int, share: float) -> Tensor:
    """A pattern in a share of its groups: those that lose the least by it first."""
    lost = (scores * ~keep).reshape(-1, size).sum(1)
    count = round(share * len(lost))
    there = torch.zeros(len(lost), dtype=torch.bool, device=keep.device)
    there[lost.argsort(stable=True)[:count]] = True
    return keep | ~there.repeat_interleave(size).reshape(keep.shape)
