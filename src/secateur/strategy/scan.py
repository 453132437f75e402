"""How much each layer can lose: one layer at a time, by thresholds |w| < q sigma and by sparsities, nothing trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from secateur.measure.classify import Answers, answers, lost
from secateur.plan import Setting
from secateur.probe import TOLERANCE, difference
from secateur.recipe import Threshold
from secateur.strategy.prefix import Kept, given, outputs_before

SIGMAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.65, 2.0, 2.6)  # of normal weights 20 to 99 %
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
CUTS = [*(("sigma", value) for value in SIGMAS), *(("sparsity", value) for value in SPARSITIES)]  # of every layer

Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Probe:
    """A layer with a part of its weights gone, all others as they were. by: sigma or sparsity, and its value; sparsity:
    what that came to; drop of top-1, share of flips, and KL against the dense model.
    """

    layer: str
    by: str
    value: float
    sparsity: float
    drop: float
    flips: float
    kl: float


def probe(
    model: nn.Module,
    setting: Setting,
    cuts: Sequence[tuple[str, float]],
    batches: Batches,
    dense: Answers,
    tick: Callable[[float], None] = lambda share: None,
) -> list[Probe]:
    """Cut one layer in several ways, ask, and put it back. What comes before the layer is computed once for all of them.
    model: in eval mode. tick: called with the share of it that is done.
    """
    parameter = model.get_parameter(setting.layer.parameter)
    before = parameter.detach().clone()
    keep = [_choose(setting, by, value, setting.layer.matrix(before).float()) for by, value in cuts]
    logits: list[list[Tensor]] = [[] for _ in cuts]
    try:
        for number, (x, y) in enumerate(batches):
            plain = dense.logits[sum(map(len, logits[0])) :][: len(y)]
            kept = _checked(model, outputs_before(model, parameter, x), x, y, plain)
            for found, mask in zip(logits, keep, strict=True):
                with torch.no_grad():
                    setting.layer.write_(parameter, setting.layer.matrix(before) * mask)
                with given(kept):
                    found.append(answers(model, [(x, y)]).logits)
            with torch.no_grad():
                parameter.copy_(before)
            tick((number + 1) / len(batches))
    finally:
        with torch.no_grad():
            parameter.copy_(before)
    losses = [lost(dense, Answers(torch.cat(found), dense.labels)) for found in logits]
    return [
        Probe(setting.layer.name, by, value, 1 - float(mask.float().mean()), found.drop, found.flips, found.kl)
        for (by, value), mask, found in zip(cuts, keep, losses, strict=True)
    ]


def _choose(setting: Setting, by: str, value: float, weight: Tensor) -> Tensor:
    """Which weights stay [rows, cols]."""
    threshold = Threshold(sigma=value, absolute=None) if by == "sigma" else None
    return replace(setting, threshold=threshold, sparsity=value).choose(float(weight.std()))(weight.abs())


def _checked(model: nn.Module, kept: Kept, x: Tensor, y: Tensor, plain: Tensor) -> Kept:
    """Nothing, where the model answers otherwise with what was kept: it does more than its modules say."""
    if not kept:
        return []
    with given(kept):
        try:
            again = answers(model, [(x, y)]).logits
        except Exception:  # the model's own: it misses what a module did beside its answer
            return []
    return kept if difference(again, plain) <= TOLERANCE else []


def measured_sparsities(
    probes: Sequence[Probe], sizes: Mapping[str, int], target: float, most: float = 0.99
) -> dict[str, float]:
    """Per layer the sparsity at which its own KL reaches a level that is the same for all, so that over all layers the
    target is met: layers that feel it less lose more.
    """
    curves = {name: _curve([p for p in probes if p.layer == name], most) for name in sizes}
    low, high = 1e-9, 1e3
    found: dict[str, float] = {}
    for _ in range(100):
        level = (low * high) ** 0.5
        found = {name: float(np.interp(np.log(level), *curve)) for name, curve in curves.items()}
        if sum(found[n] * sizes[n] for n in sizes) < target * sum(sizes.values()):
            low = level
        else:
            high = level
    return found


def _curve(probes: Sequence[Probe], most: float) -> tuple[list[float], list[float]]:
    """log KL -> sparsity, rising in both."""
    points = sorted((p.sparsity, p.kl) for p in probes)
    sparsities, kls = [0.0], [1e-9]
    for sparsity, kl in points:
        if sparsity > sparsities[-1]:
            sparsities.append(min(sparsity, most))
            kls.append(max(kl, kls[-1] * 1.001))
    return [float(np.log(k)) for k in [*kls, 1e3]], [*sparsities, most]
