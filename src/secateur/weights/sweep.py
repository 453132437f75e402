"""The SparseGPT column sweep, blocked twice so that nearly all of its work is matrix products."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.weights.granularity import Choose

BLOCK = 128  # columns chosen together, and per trailing matrix product: the published block size
STRIP = 16  # columns updated one by one before a small matrix product takes over


def sweep_matrix(weight: Tensor, factor: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
    """Prune weight [out, in] with the upper factor R [in, in], R'R = H^-1. Returns the new weight and the keep mask
    (both transposed in memory: a copy would cost as much as the layer).

    Column i's removal error w_i / R_ii is subtracted from the columns to the right along R's row i (arXiv:2301.00774,
    eq. 3). The matrix is kept transposed, so that a column is contiguous.
    """
    columns = weight.t().clone(memory_format=torch.contiguous_format)  # [in, out], never the caller's memory
    width = columns.shape[0]
    step = choose.granularity.sweep or BLOCK
    block = max(step, BLOCK // step * step)
    keep = torch.empty_like(columns, dtype=torch.bool)
    for start in range(0, width, block):
        stop = min(start + block, width)
        errors = _sweep_block(columns, keep, factor, choose, range(start, stop), step)
        if stop < width:
            columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    if not all(math.isfinite(float(edge)) for edge in columns.aminmax()):  # isfinite would need as much memory again
        raise SecateurError("the sweep ran into NaN or Inf: the weights or the calibration inputs are not finite")
    return columns.t(), keep.t()


def _sweep_block(columns: Tensor, keep: Tensor, factor: Tensor, choose: Choose, block: range, step: int) -> Tensor:
    """Sweep the block's columns, choosing `step` at a time; returns their errors [len(block), out]."""
    scale = factor.diagonal()[block.start : block.stop, None].reciprocal()  # [block, 1]
    gone = errors = torch.empty_like(columns[block.start : block.stop])
    strip = max(step, STRIP // step * step) if step < BLOCK else STRIP
    for first in range(block.start, block.stop, strip):
        last = min(first + strip, block.stop)
        for i in range(first, last):
            here = i - block.start
            if here % step == 0:
                end = min(here + step, len(block))
                gone = _decide(columns, keep, choose, i, block.start + end, scale[here:end])
            torch.mul(columns[i], gone[here % step], out=errors[here])
            if i + 1 < last:
                columns[i + 1 : last].addr_(factor[i, i + 1 : last], errors[here], alpha=-1)
        if last < block.stop:
            done = slice(first - block.start, last - block.start)
            columns[last : block.stop].addmm_(factor[first:last, last : block.stop].t(), errors[done], alpha=-1)
    columns[block.start : block.stop] *= keep[block.start : block.stop]
    return errors


def _decide(columns: Tensor, keep: Tensor, choose: Choose, start: int, stop: int, scale: Tensor) -> Tensor:
    """Choose within columns start..stop by (w / R_jj)^2, the OBS saliency in the problem that is left.

    scale: 1 / R_jj, [stop - start, 1]. Returns it where a weight goes, else 0: [stop - start, out].
    """
    scores = (columns[start:stop] * scale).square_()
    keep[start:stop] = choose.between(scores.t(), start, stop).t()
    return ~keep[start:stop] * scale
