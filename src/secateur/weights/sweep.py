"""The SparseGPT column sweep, blocked twice so that nearly all of its work is matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.weights.granularity import Choose

BLOCK = 128  # columns chosen together, and per trailing matrix product: the published block size
STRIP = 16  # columns updated one by one before a small matrix product takes over


def sweep_matrix(weight: Tensor, factor: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
    """Prune weight [out, in] with the upper factor R [in, in], R'R = H^-1. Returns the new weight and the keep mask.

    Column i's removal error w_i / R_ii is subtracted from the columns to the right along R's row i (arXiv:2301.00774,
    eq. 3). The matrix is kept transposed, so that a column is contiguous.
    """
    columns = weight.t().clone(memory_format=torch.contiguous_format)  # [in, out], never the caller's memory
    width = columns.shape[0]
    diagonal = factor.diagonal()
    step = choose.granularity.sweep or 0
    block = BLOCK if not step else max(step, BLOCK // step * step)
    keep = torch.empty_like(columns, dtype=torch.bool)
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = _sweep_block(columns, keep, factor, diagonal, choose, start, stop, step)
        if stop < width:
            columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    if not bool(torch.isfinite(columns).all()):
        raise SecateurError("the sweep ran into NaN or Inf: the weights or the calibration inputs are not finite")
    return columns.t().contiguous(), keep.t().contiguous()


def _sweep_block(
    columns: Tensor,
    keep: Tensor,
    factor: Tensor,
    diagonal: Tensor,
    choose: Choose,
    start: int,
    stop: int,
    step: int,
) -> Tensor:
    """Sweep columns start..stop; returns their errors [stop - start, out]."""
    errors = torch.empty_like(columns[start:stop])
    if not step:
        _decide(columns, keep, diagonal, choose, start, stop)
        gone = _scaled_removals(keep, diagonal, start, stop)
    strip = STRIP if not step else max(step, STRIP // step * step)
    for first in range(start, stop, strip):
        last = min(first + strip, stop)
        for i in range(first, last):
            if step and (i - start) % step == 0:
                _decide(columns, keep, diagonal, choose, i, i + step)
                gone_now = _scaled_removals(keep, diagonal, i, i + step)
            error = errors[i - start]
            torch.mul(columns[i], gone_now[(i - start) % step] if step else gone[i - start], out=error)
            if i + 1 < last:
                columns[i + 1 : last].addr_(factor[i, i + 1 : last], error, alpha=-1)
        if last < stop:
            columns[last:stop].addmm_(factor[first:last, last:stop].t(), errors[first - start : last - start], alpha=-1)
    columns[start:stop] *= keep[start:stop]
    return errors


def _decide(columns: Tensor, keep: Tensor, diagonal: Tensor, choose: Choose, start: int, stop: int) -> None:
    """Choose within columns start..stop by w^2 / R_jj^2, the OBS saliency in the problem that is left."""
    scores = (columns[start:stop] / diagonal[start:stop, None]).square_()
    keep[start:stop] = choose.between(scores.t(), start, stop).t()


def _scaled_removals(keep: Tensor, diagonal: Tensor, start: int, stop: int) -> Tensor:
    """1 / R_jj where a weight goes, else 0: [stop - start, out]."""
    return (~keep[start:stop]) / diagonal[start:stop, None]
