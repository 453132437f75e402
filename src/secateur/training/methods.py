"""Methods: which weights are there while a model trains. Each maps a moment to keep masks [out, in], layer by layer.

Add one: write the function, add a line to METHODS with the schedule that it goes with, add a row to
tests/training/test_methods.py. What it has to see at every step, and not just when masks are chosen, is `watch`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.training.moment import Keeps, Live, Moment, wide
from secateur.weights.granularity import count, lowest

REPLACED = 0.3  # share of the weights that are there of which SET and RigL make others, at first


def gradual(moment: Moment) -> Keeps:
    """The lowest scores go, more and more of them as the schedule says. Zhu & Gupta 2017, arXiv:1710.01878."""
    return moment.by_recipe()


def static(moment: Moment) -> Keeps:
    """Chosen once, or given, then left alone: the baseline of sparse training."""
    return {layer.name: layer.keep for layer in moment.layers} if moment.begun else moment.by_recipe()


def set_(moment: Moment) -> Keeps:
    """The smallest weights go, random ones come in their place. Mocanu et al. 2018, arXiv:1707.04780, algorithm 1."""
    if not moment.begun:
        return moment.by_recipe()
    noise = {
        layer.name: torch.rand(layer.weight.shape, generator=moment.generator(layer)).to(layer.weight.device)
        for layer in moment.layers
    }
    return {layer.name: _replaced(layer, REPLACED, noise[layer.name], again=False) for layer in moment.layers}


def rigl(moment: Moment) -> Keeps:
    """The smallest weights go, and those with the largest gradients come; ever fewer of them, along a cosine. Evci et al.
    2020, arXiv:1911.11134, algorithm 1 and eq. 1.
    """
    if not moment.begun:
        return moment.by_recipe()
    share = REPLACED / 2 * (1 + math.cos(math.pi * moment.progress))
    return {
        layer.name: layer.keep if layer.gradient is None else _replaced(layer, share, layer.gradient.abs(), again=True)
        for layer in moment.layers
    }


def _replaced(layer: Live, share: float, growth: Tensor, again: bool) -> Tensor:
    """Without the smallest weights that are there, and with as many units of the highest growth [out, in].

    again: whether what goes may come back at once.
    """
    granularity = layer.setting.granularity
    there = granularity.units(layer.keep.float()) > 0.5  # [groups, units]
    size = granularity.units(layer.weight.abs().float())
    gone = lowest(size.masked_fill(~there, torch.inf).reshape(1, -1), count(share, int(there.sum()))).reshape(
        there.shape
    )
    stays = there & ~gone
    wanted = granularity.units(growth.float())
    wanted = wanted / wanted.max().clamp(min=torch.finfo(torch.float32).tiny)
    wanted = wanted if again else wanted.masked_fill(gone, -1.0)
    score = wanted.masked_fill(stays, 2.0)
    missing = there.shape[1] - there.sum(1)  # of every group: as many stay as were there
    ranks = score.argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return granularity.spread(ranks >= missing[:, None], (layer.weight.shape[0], layer.weight.shape[1]))


def movement(moment: Moment) -> Keeps:
    """Weights that move towards zero go, however large they are. Sanh et al. 2020, arXiv:2005.07683, eq. 2 and 4."""
    if not any(bool(layer.memory["score"].any()) for layer in moment.layers):
        return moment.choose({layer.name: wide(layer.weight).abs() for layer in moment.layers})
    low = min(float(layer.memory["score"].min()) for layer in moment.layers)  # allocations want scores of 0 or more
    return moment.choose({layer.name: layer.memory["score"] - low for layer in moment.layers})


def watch_movement(layers: Sequence[Live]) -> None:
    """S <- S - rate w dL/dw' with w as it was before the step, and where it is masked as it was when it went: eq. 4."""
    for layer in layers:
        now = wide(layer.weight)
        weight = layer.memory.setdefault("weight", now.clone())
        score = layer.memory.setdefault("score", torch.zeros_like(weight))
        if layer.gradient is not None:
            score.sub_(layer.rate * weight * wide(layer.gradient))
        weight.copy_(torch.where(layer.keep, now, weight))


class Method(NamedTuple):
    """How masks are chosen; the schedule that it goes with; what it sees of the beginning, and of every step."""

    choose: Callable[[Moment], Keeps]
    schedule: str
    about: str
    watch: Callable[[Sequence[Live]], None] | None = None


METHODS: dict[str, Method] = {
    "gradual": Method(gradual, "cubic", "more and more weights go as training goes on"),
    "static": Method(static, "one-shot", "one mask, from the beginning to the end"),
    "set": Method(set_, "one-shot", "the smallest weights go, random ones come"),
    "rigl": Method(rigl, "one-shot", "the smallest weights go, those with the largest gradients come"),
    "ac-dc": Method(gradual, "alternating", "dense and sparse phases in turns"),
    "movement": Method(movement, "cubic", "weights that move towards zero go", watch_movement),
}
