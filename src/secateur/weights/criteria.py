"""Criteria: how important is each weight? Every function maps a weight and what calibration saw of its layer to a
score of the same shape; the lowest scores go first.

Add one: write the function, add a line to CRITERIA with the statistics that it reads, add a row to
tests/weights/test_criteria.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.weights.stats import Stats

Score = Callable[[Tensor, Stats], Tensor]


def magnitude(weight: Tensor, stats: Stats) -> Tensor:
    """|w|. Han et al. 2015, arXiv:1506.02626."""
    return weight.abs()


def random(weight: Tensor, stats: Stats) -> Tensor:
    """Uniform noise from stats.seed: the baseline that every criterion has to beat."""
    generator = torch.Generator().manual_seed(stats.seed)
    return torch.rand(weight.shape, generator=generator).to(weight.device)


def taylor(weight: Tensor, stats: Stats) -> Tensor:
    """|w g|: the first-order change of the loss when w goes to 0. Molchanov et al. 2017, arXiv:1611.06440, eq. 8.

    Uses stats.mean_gradient: [out, in].
    """
    return (weight * stats.mean_gradient).abs()


def obd(weight: Tensor, stats: Stats) -> Tensor:
    """w^2 h / 2, h = d2 loss / dw2: the loss increase when the Hessian is taken as diagonal. LeCun et al. 1989, eq. 3.

    Uses stats.curvature: [out, in], estimated by Rademacher probes (Hutchinson), negative estimates taken as 0.
    """
    return weight.square() * stats.curvature / 2


def fisher(weight: Tensor, stats: Stats) -> Tensor:
    """w^2 F / 2, F = E[g^2]: OBD with the empirical Fisher for the Hessian. Theis et al. 2018, arXiv:1801.05787, eq. 6.

    Uses stats.fisher: [out, in].
    """
    return weight.square() * stats.fisher / 2


def obs(weight: Tensor, stats: Stats) -> Tensor:
    """w^2 / [H^-1]_jj, H = X'X + damping: the error left after the other weights of the row make up for w.

    Hassibi & Stork 1992, "Second order derivatives for network pruning", eq. 5, on the layer's reconstruction error.
    Uses stats.inverse_diagonal: [in], infinite for dead inputs, whose weights cost nothing.
    """
    return weight.square() / stats.inverse_diagonal  # [out, in] / [in]


def wanda(weight: Tensor, stats: Stats) -> Tensor:
    """|w_ij| * ||x_j||_2: magnitude times the norm of the input it multiplies. Sun et al. 2023, arXiv:2306.11695, eq. 1.

    Uses stats.input_norm: [in], the root of the summed squares over all calibration tokens.
    """
    return weight.abs() * stats.input_norm  # [out, in] * [in]


def ria(weight: Tensor, stats: Stats) -> Tensor:
    """(|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) * ||x_j||_2^(1/2): the share of its row and column that a weight
    holds, so that no channel is emptied. Zhang et al. 2024, "Plug-and-Play" (RIA), ICLR, eq. 3-4 with a = 1/2.

    Uses stats.input_norm: [in], and sums over the rows that have inputs in common.
    """
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    share = size / stats.column_sums(size).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
    return share * stats.input_norm.sqrt()  # [out, in] * [in]


class Criterion(NamedTuple):
    """score, and the statistics that it reads: of "squares", "gram", "gradient", "fisher", "curvature"."""

    score: Score
    needs: frozenset[str] = frozenset()


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude),
    "random": Criterion(random),
    "taylor": Criterion(taylor, frozenset({"gradient"})),
    "obd": Criterion(obd, frozenset({"curvature"})),
    "fisher": Criterion(fisher, frozenset({"fisher"})),
    "obs": Criterion(obs, frozenset({"gram"})),
    "wanda": Criterion(wanda, frozenset({"squares"})),
    "ria": Criterion(ria, frozenset({"squares"})),
}
