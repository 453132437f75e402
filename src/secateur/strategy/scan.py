"""How much each layer can lose: one layer at a time, by thresholds |w| < q sigma and by sparsities, nothing trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from secateur.measure.classify import Answers, answers, lost
from secateur.plan import Plan, Setting
from secateur.recipe import Threshold

SIGMAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.65, 2.0, 2.6)  # of normal weights 20 to 99 %
SPARSITIES = (0.5, 0.8, 0.9, 0.95)

Batches = Sequence[tuple[Tensor, Tensor]]
Progress = Callable[[str, int, int, str], None]


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


def cells(plan: Plan) -> list[tuple[Setting, str, float]]:
    """Everything that is tested."""
    grid = [("sigma", value) for value in SIGMAS] + [("sparsity", value) for value in SPARSITIES]
    return [(setting, by, value) for setting in plan.settings for by, value in grid]


def probe(model: nn.Module, setting: Setting, by: str, value: float, batches: Batches, dense: Answers) -> Probe:
    """Cut one layer, ask, and put it back."""
    parameter = model.get_parameter(setting.layer.parameter)
    before = parameter.detach().clone()
    weight = setting.layer.matrix(before).float()
    changed = replace(
        setting,
        threshold=Threshold(sigma=value, absolute=None) if by == "sigma" else None,
        sparsity=value,
    )
    keep = changed.choose(float(weight.std()))(weight.abs())
    try:
        with torch.no_grad():
            setting.layer.write_(parameter, setting.layer.matrix(before) * keep)
        found = lost(dense, answers(model, batches))
    finally:
        with torch.no_grad():
            parameter.copy_(before)
    sparsity = 1 - float(keep.float().mean())
    return Probe(setting.layer.name, by, value, sparsity, found.drop, found.flips, found.kl)


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
