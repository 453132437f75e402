"""What optimizers know of parameters: their learning rates, their momentum, whether they stepped at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from secateur.training.masks import named, placed, whole


def skipped(optimizer: Optimizer) -> bool:
    """Whether a scaler found an infinity: a fused optimizer is called all the same, and does nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def parameters(optimizer: Optimizer) -> set[int]:
    """The ids of what it updates."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def rates(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, float]:
    """Parameter -> learning rate of its group."""
    own = {id(p): float(group["lr"]) for each in optimizers for group in each.param_groups for p in group["params"]}
    return {name: own[id(parameter)] for name, parameter in named(model) if id(parameter) in own}


@torch.no_grad()
def fresh_(model: nn.Module, optimizers: Sequence[Optimizer], grown: Mapping[str, Tensor]) -> None:
    """Weights that come have no momentum; their second moments are the layer's median, since with zero Adam's first step
    would be several times its learning rate.
    """
    for name, parameter in named(model):
        new = grown.get(name)
        state: Mapping[str, Tensor] = next((o.state[parameter] for o in optimizers if parameter in o.state), {})
        if new is None or not state or not bool(new.any()):
            continue
        there = placed(new, parameter)
        for key in ("momentum_buffer", "exp_avg"):
            if isinstance(state.get(key), Tensor):
                state[key].mul_(~there)
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            if isinstance(state.get(key), Tensor):
                state[key].mul_(~there).add_(there, alpha=float(whole(state[key]).median()))
