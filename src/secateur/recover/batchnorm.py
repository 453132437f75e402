"""Batch norms keep the statistics of the model that they were trained in; after a cut they are other ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import call
from secateur.errors import SecateurError

NORMS = nn.modules.batchnorm._BatchNorm
SHARES = (0.5, 1.0)  # of new statistics, beside none


def reestimate_(model: nn.Module, batches: Iterable[Any]) -> int:
    """Give every batch norm the mean and variance of its inputs over some batches, each of which counts the same.

    batches: mappings of forward arguments, tensors, or (input, label) pairs. Everything else runs in eval mode, so that
    dropout does not show in the statistics. Returns how many norms there are; where there are none, nothing runs.

    Raises SecateurError when there are no batches; whatever fails, the statistics are then what they were.
    """
    norms = list(_norms(model).values())
    if not norms:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    old = [{name: value.clone() for name, value in norm.named_buffers(recurse=False)} for norm in norms]
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise SecateurError("there are no batches to estimate batch norms on: an iterator that was used up already?")
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        with torch.no_grad():
            for batch in chain([first], batches):
                call(model, batch)
    except BaseException:
        for norm, kept in zip(norms, old, strict=True):
            for name, value in kept.items():
                norm.get_buffer(name).copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return len(norms)


def settle_(model: nn.Module, batches: Iterable[Any], distance: Callable[[], float]) -> float:
    """Give batch norms as much of their statistics over some batches as brings the answers closest to what they should be.

    distance: of the model's answers as it is. Few images, or images cut out otherwise than those that the model was trained
    on, have statistics of their own, which cost a model more than a small cut does. Returns the share of the new
    statistics, 0, 0.5 or 1, that was taken; where there are no norms, nothing runs, and it is 0.

    Raises SecateurError when there are no batches.
    """
    old = _statistics(model)
    if not old:
        return 0.0
    best, least = 0.0, distance()
    reestimate_(model, batches)
    new = _statistics(model)
    for share in SHARES:
        _mix_(model, old, new, share)
        if (found := distance()) < least:
            best, least = share, found
    _mix_(model, old, new, best)
    return best


def _norms(model: nn.Module) -> dict[str, Any]:
    """Those that keep statistics."""
    return {name: m for name, m in model.named_modules() if isinstance(m, NORMS) and m.track_running_stats}


def _statistics(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances."""
    parts = ("running_mean", "running_var")
    return {f"{name}.{part}": getattr(norm, part).clone() for name, norm in _norms(model).items() for part in parts}


def _mix_(model: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor], share: float) -> None:
    for name, value in old.items():
        model.get_buffer(name.removeprefix(".")).copy_(value.lerp(new[name], share))
