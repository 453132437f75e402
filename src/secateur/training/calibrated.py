"""Masks by criteria that read calibration data: what the one-shot part would choose now, tried on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from secateur.plan import Plan
from secateur.prune import prune_
from secateur.recipe import Override, Recipe, Threshold
from secateur.training.masks import plain
from secateur.training.moment import Keeps
from secateur.training.schedules import Schedule
from secateur.weights.gradients import Loss
from secateur.weights.layers import Layer

TINY = 1e-12  # a threshold is above 0


def chooser(model: nn.Module, plan: Plan, data: Iterable[Any], loss: Loss | None) -> Callable[[Schedule, float], Keeps]:
    """What chooses by the plan's recipe, as far as a schedule has come."""
    batches = list(data)
    own = {setting.layer.name: setting.layer for setting in plan.settings}

    def choose(schedule: Schedule, progress: float) -> Keeps:
        found: dict[str, Tensor] = {}

        def chosen(layer: Layer, keep: Tensor) -> None:
            known = own[plain(layer.name)]  # raw matrices are turned as the data show that they are used
            found[known.name] = keep if layer.transposed == known.transposed else keep.t()

        prune_(copy.deepcopy(model), at(plan.recipe, schedule, progress), batches, loss=loss, chosen=chosen)
        return found

    return choose


def at(recipe: Recipe, schedule: Schedule, progress: float) -> Recipe:
    """The recipe as far as a schedule has come; an N:M pattern is there from the beginning, a threshold rises evenly."""

    def so_far(part: Recipe | Override) -> dict[str, Any]:
        if part.threshold is not None:
            given = part.threshold.model_dump(exclude_none=True)
            return {"threshold": Threshold(**{name: max(value * progress, TINY) for name, value in given.items()})}
        fixed = part.sparsity is None or ":" in (part.granularity or "")
        return {} if fixed else {"sparsity": schedule(progress, part.sparsity or 0.0)}

    overrides = tuple(override.model_copy(update=so_far(override)) for override in recipe.overrides)
    return recipe.model_copy(update={"overrides": overrides, **so_far(recipe)})
