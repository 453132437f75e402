"""Masks before training. SNIP (Lee et al. 2019, arXiv:1810.02340) is the criterion taylor with the allocation global on a
batch: Pruner(model, method("taylor", allocation="global", sparsity=0.9), .., method="static", data=batches, loss=loss).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.plan import make_plan
from secateur.probe import answer
from secateur.recipe import Recipe
from secateur.training.masks import Masks
from secateur.training.moment import Moment, by_parameter, deviations, live
from secateur.training.schedules import iterative

ROUNDS = 100


def synflow(model: nn.Module, recipe: Recipe, example: Tensor, rounds: int = ROUNDS) -> Masks:
    """Masks that let as much flow through as can be, without data: |w dR/dw| with R the sum of the outputs of ones, all
    weights being their absolute values; in many rounds, since each changes the flow. Tanaka et al. 2020, arXiv:2006.05467,
    algorithm 1. example: a batch that says the shape of the inputs. The recipe's criterion is not asked; its allocation is
    "global" in the paper. All of it happens on a copy. Raises SecateurError for token ids, and without a sparsity.
    """
    if not example.is_floating_point():
        raise SecateurError("synflow sends ones through the model: give an example of real numbers, not of token ids")
    if recipe.sparsity is None:
        raise SecateurError("synflow removes a share of the weights: give a sparsity, not a threshold or a pattern")
    linear = copy.deepcopy(model).double().eval()
    plan = make_plan(linear, recipe)
    ones = torch.ones(1, *example.shape[1:], dtype=torch.float64, device=example.device)
    with torch.no_grad():
        for value in linear.state_dict().values():
            if value.is_floating_point():
                value.abs_()
    for parameter in linear.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    masks, deviation = Masks({}), deviations(linear, plan)
    for number in range(1, rounds + 1):
        masks.apply_(linear)
        linear.zero_grad()
        with torch.enable_grad():
            answer(linear(ones)).sum().backward()
        layers = live(linear, plan, masks, deviation)
        scores = {x.name: x.weight if x.gradient is None else (x.weight * x.gradient).abs() for x in layers}
        keeps = Moment(plan, layers, iterative, number / rounds, number).choose(scores)
        masks = Masks(by_parameter(linear, layers, keeps))
    return masks
