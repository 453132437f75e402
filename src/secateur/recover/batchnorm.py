"""Batch norms keep the statistics of the model that they were trained in; after a cut they are other ones."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn

from secateur.data import call
from secateur.errors import SecateurError

NORMS = nn.modules.batchnorm._BatchNorm


def reestimate_(model: nn.Module, batches: Iterable[Any]) -> int:
    """Give every batch norm the mean and variance of its inputs over some batches, each of which counts the same.

    batches: mappings of forward arguments, tensors, or (input, label) pairs. Everything else runs in eval mode, so that
    dropout does not show in the statistics. Returns how many norms there are; where there are none, nothing runs.

    Raises SecateurError when there are no batches; the statistics are then what they were.
    """
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.track_running_stats]
    if not norms:
        return 0
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
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
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return len(norms)
