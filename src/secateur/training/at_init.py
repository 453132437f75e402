"""Masks before training. SNIP (Lee et al. 2019, arXiv:1810.02340) is the criterion taylor with the allocation global on a
batch: Pruner(model, method("taylor", allocation="global", sparsity=0.9), .., method="static", data=batches, loss=loss).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.plan import make_plan
from secateur.recipe import Recipe
from secateur.structure.running import evaluating
from secateur.training.masks import Masks
from secateur.training.moment import Moment, by_parameter, live
from secateur.training.schedules import iterative

ROUNDS = 100


def synflow(model: nn.Module, recipe: Recipe, example: Tensor, rounds: int = ROUNDS) -> Masks:
    """Masks that let as much flow through as can be, without data: |w dR/dw| with R the sum of the outputs of ones, all
    weights being their absolute values; in many rounds, since each changes the flow. Tanaka et al. 2020, arXiv:2006.05467,
    algorithm 1. example: a batch that says the shape of the inputs. The recipe's criterion is not asked; its allocation is
    "global" in the paper.
    """
    plan = make_plan(model, recipe)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    dtype = next(model.parameters()).dtype
    ones = torch.ones(1, *example.shape[1:], dtype=torch.float64, device=example.device)
    masks = Masks({})
    try:
        model.double()
        with evaluating(model):
            for number in range(1, rounds + 1):
                with torch.no_grad():
                    for name, value in model.state_dict().items():
                        value.copy_(before[name].abs() if value.is_floating_point() else before[name])
                masks.apply_(model)
                model.zero_grad()
                with torch.enable_grad():
                    model(ones).sum().backward()
                layers = live(model, plan, masks, {})
                scores = {x.name: x.weight if x.gradient is None else (x.weight * x.gradient).abs() for x in layers}
                keeps = Moment(plan, layers, iterative, number / rounds, number).choose(scores)
                masks = Masks(by_parameter(model, layers, keeps))
    finally:
        model.to(dtype)
        model.load_state_dict(before)
        model.zero_grad()
    return masks
