"""Updates: what happens to a layer's weights once it is known, or while it is found out, which ones go.

Every update maps (weight [out, in] float32, stats, choose, criterion) to (new weight, keep). `choose` turns scores into
a keep mask. Add one: write the function, add a line to UPDATES with the statistics that it reads and the criterion
whose scores it can compute on weights that change; for any other criterion it gets its mask beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.weights.admm import admm_matrix
from secateur.weights.criteria import CRITERIA
from secateur.weights.granularity import Choose
from secateur.weights.refit import refit_matrix
from secateur.weights.stats import Stats
from secateur.weights.sweep import sweep_matrix

Updated = tuple[Tensor, Tensor]


def none(weight: Tensor, stats: Stats, choose: Choose, criterion: str) -> Updated:
    """Zero what is not kept and leave the rest."""
    keep = choose(CRITERIA[criterion].score(weight, stats))
    return weight * keep, keep


def sparsegpt(weight: Tensor, stats: Stats, choose: Choose, criterion: str) -> Updated:
    """Column by column, remove weights and let the columns to the right make up for it. Frantar & Alistarh 2023,
    arXiv:2301.00774, algorithm 1. With the criterion "obs" each choice is made from weights already compensated.
    """
    width = choose.granularity.sweep
    if criterion == "obs" and width is not None and stats.inputs.squares is not None and len(stats.inputs.squares) == 1:
        # as in the published code the weights of dead inputs score 0; here those that stay are as before
        dead = stats.inputs.dead(0)
        factor = stats.inputs.factor(stats.damp)[0]
        if not bool(dead.any()):
            return sweep_matrix(weight, factor, choose)
        new, keep = sweep_matrix(weight.masked_fill(dead, 0), factor, choose)
        return torch.where(dead, weight * keep, new), keep
    choose = choose.with_mask(choose(CRITERIA[criterion].score(weight, stats)))
    return _by_groups(weight, stats, choose, lambda w, g, c: sweep_matrix(w, stats.inputs.factor(stats.damp)[g], c))


def refit(weight: Tensor, stats: Stats, choose: Choose, criterion: str) -> Updated:
    """Choose by the criterion, then give the kept weights their least-squares values:
    min ||X w - X w_dense||^2 + damping, row by row (conjugate gradients on all rows at once).
    """
    choose = choose.with_mask(choose(CRITERIA[criterion].score(weight, stats)))
    return _by_groups(weight, stats, choose, lambda w, g, c: refit_matrix(w, _gram(stats, g), c, stats.damp))


def admm(weight: Tensor, stats: Stats, choose: Choose, criterion: str) -> Updated:
    """Alternate between the least-squares problem and the nearest sparse weights. Boza 2024, arXiv:2401.02938; the
    rising penalty follows Meng et al. 2024 (ALPS), arXiv:2406.07831. With the criterion "wanda" the choice is part of
    the alternation.
    """
    groups = stats.inputs.squares is not None and len(stats.inputs.squares)
    if criterion != "wanda" or groups != 1:
        choose = choose.with_mask(choose(CRITERIA[criterion].score(weight, stats)))
    return _by_groups(weight, stats, choose, lambda w, g, c: admm_matrix(w, stats.inputs, g, c, stats.damp))


def _gram(stats: Stats, group: int) -> Tensor:
    assert stats.inputs.gram is not None
    return stats.inputs.gram[group]


def _by_groups(
    weight: Tensor, stats: Stats, choose: Choose, solve: Callable[[Tensor, int, Choose], Updated]
) -> Updated:
    """Solve for each group of rows that has inputs of its own (grouped convolutions; otherwise there is one)."""
    assert stats.inputs.squares is not None
    groups = len(stats.inputs.squares)
    if groups == 1:
        return solve(weight, 0, choose)
    assert choose.fixed is not None
    parts = zip(weight.chunk(groups), choose.fixed.chunk(groups), strict=True)
    solved = [solve(rows, g, choose.with_mask(keep)) for g, (rows, keep) in enumerate(parts)]
    return torch.cat([w for w, _ in solved]), choose.fixed


class Update(NamedTuple):
    """solve, the statistics that it reads, and the criterion that it can follow while weights change."""

    solve: Callable[[Tensor, Stats, Choose, str], Updated]
    needs: frozenset[str] = frozenset()
    chooses_by: str | None = None


UPDATES: dict[str, Update] = {
    "none": Update(none),
    "sparsegpt": Update(sparsegpt, frozenset({"gram"}), "obs"),
    "refit": Update(refit, frozenset({"gram"})),
    "admm": Update(admm, frozenset({"gram"}), "wanda"),
}
