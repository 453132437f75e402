"""Iterative pruning: train, cut a share of what is left, rewind, train again. Lottery tickets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.plan import make_plan
from secateur.recipe import Recipe, nearest
from secateur.training.calibrated import at
from secateur.training.masks import Masks
from secateur.training.moment import Moment, by_parameter, deviations, live
from secateur.training.schedules import iterative, one_shot

REWINDS = ("weights", "learning-rate")
KEPT = 0.8  # share of what is left that each round keeps
COUNT = 8  # rounds, where thresholds rise

Train = Callable[[nn.Module, Masks], None]  # trains the model in place, holding the masks


@dataclass(frozen=True)
class Round:
    """A round that has been trained. number: from 1 on; sparsity: of the layers that are pruned."""

    number: int
    sparsity: float
    masks: Masks


def iterate_(
    model: nn.Module,
    recipe: Recipe,
    train: Train,
    *,
    keep: float = KEPT,
    rewind: str = "weights",
    to: Mapping[str, Tensor] | None = None,
) -> Iterator[Round]:
    """Rounds, each of which keeps a share of the weights that are left and trains them, until the recipe's sparsity.

    train: a training of one's own, such as lambda model, masks: fit(model, Pruner(model, recipe, optimizer, steps,
    method="static", masks=masks)); it begins anew each time, learning rate and all. rewind: the weights that are left go
    back to what `to` says, a state dict of the beginning or of an early step (Frankle & Carbin 2019, arXiv:1803.03635, and
    Frankle et al. 2020, arXiv:1912.05671); just the learning rate, from the weights as they are (Renda et al. 2020,
    arXiv:2003.02389).

    The model has been trained when it comes here; after each round it is as trained. Raises SecateurError where the
    request makes no sense.
    """
    check_rewind(rewind, keep, recipe)
    if rewind == "weights" and to is None:
        raise SecateurError("rewinding weights needs to know what to: give the state dict of an early step (to=...)")
    own = model.state_dict()
    other = [] if to is None else [n for n in {*own, *to} if n not in own or n not in to or own[n].shape != to[n].shape]
    if other:
        raise SecateurError(f"the state dict to rewind to is another model's: {sorted(other)[0]} differs")
    before = deviations(model, make_plan(model, recipe))
    kept = None if to is None else {name: value.detach().clone() for name, value in to.items()}
    masks = Masks({})
    for number, progress in enumerate(progresses(recipe, keep), 1):
        masks = cut(model, recipe, masks, progress, before)
        if rewind == "weights" and kept is not None:
            model.load_state_dict(kept)
        masks.apply_(model)
        train(model, masks)
        masks.apply_(model)
        yield Round(number, masks.sparsity, masks)


def progresses(recipe: Recipe, keep: float) -> list[float]:
    """Where each round is on the way to the recipe's sparsity or threshold, 0..1: the last one reaches it."""
    if recipe.threshold is not None:
        return [number / COUNT for number in range(1, COUNT + 1)]
    sparsity = recipe.sparsity or 0.0
    found = []
    left = keep
    while left > (1 - sparsity) * 1.15:  # a last round that changes next to nothing is none
        found.append(math.log(left) / math.log(1 - sparsity))
        left *= keep
    return [*found, 1.0]


def cut(
    model: nn.Module, recipe: Recipe, masks: Masks, progress: float, before: Mapping[str, float] | None = None
) -> Masks:
    """Masks by the recipe as far as a progress in 0..1 says; what was gone stays gone. before: `deviations` of the model
    before anything was pruned; of the model as it is, if not given.
    """
    plan = make_plan(model, at(recipe, iterative, progress))
    layers = live(model, plan, masks, deviations(model, plan) if before is None else before)
    for layer in layers:
        layer.weight = layer.weight * layer.keep  # what is masked goes first
    with torch.no_grad():
        keeps = Moment(plan, layers, one_shot, 1.0, 0).by_recipe()
        keeps = {layer.name: keeps[layer.name] & layer.keep for layer in layers}
    return Masks(by_parameter(model, layers, keeps))


def check_rewind(rewind: str, keep: float, recipe: Recipe) -> None:
    """Raises SecateurError."""
    if rewind not in REWINDS:
        raise SecateurError(f"unknown rewind {rewind!r}{nearest(rewind, REWINDS)}; known: {', '.join(REWINDS)}")
    if not 0 < keep < 1:
        raise SecateurError(f"keep is {keep}; expected the share of what is left that a round keeps, between 0 and 1")
    if not recipe.sparsity and recipe.threshold is None:
        raise SecateurError("rounds go on until a sparsity or a threshold is reached: give one (sparsity: 0.95)")
    if recipe.needs() or recipe.update != "none":
        raise SecateurError(
            "rounds choose by weights alone and train afterwards: use the criterion magnitude or random, update none"
        )
