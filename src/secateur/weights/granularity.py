"""Granularity: which weights compete, and which stand or fall together.

A granularity is a grouping: scores [out, in] are laid out as [groups, units], the lowest units of each group go, and the
decision is spread back to [out, in]. `Choose` holds a granularity and how much to remove; mask True = kept.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError


def count(sparsity: float, units: int) -> int:
    """How many of `units` go: the whole number at or below sparsity * units (up to rounding of the product)."""
    return min(units, math.floor(sparsity * units * (1 + 1e-12) + 1e-9))


def lowest(scores: Tensor, number: int) -> Tensor:
    """True at the `number` lowest scores of each group, ties broken by index. scores: [groups, units]."""
    units = scores.shape[1]
    if number <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if number >= units:
        return torch.ones_like(scores, dtype=torch.bool)
    if units <= 16:
        return _ranks(scores.t()).lt(number).t()
    edge = _kth(scores, number)  # [groups, 1]
    at_most = scores <= edge
    surplus = torch.count_nonzero(at_most, dim=1)[:, None] - number  # ties that stay
    if not bool(surplus.any()):
        return at_most
    ties = scores == edge
    return at_most & ~(ties & (ties.flip(1).cumsum(1).flip(1) <= surplus))


def _ranks(scores: Tensor) -> Tensor:
    """The rank of each score in its column, ties by index: [units, groups] int8. Quadratic in units, all vector work."""
    units = scores.shape[0]
    ranks = torch.arange(units, dtype=torch.int8, device=scores.device)[:, None].repeat(1, scores.shape[1])
    for i in range(units - 1):
        later_first = (scores[i + 1 :] < scores[i]).view(torch.int8)
        ranks[i] += later_first.sum(0, dtype=torch.int8) if units - i > 2 else later_first[0]
        ranks[i + 1 :] -= later_first
    return ranks


def _kth(scores: Tensor, number: int) -> Tensor:
    """The number-th lowest score of each group: [groups, 1]."""
    if scores.device.type != "cpu":
        return scores.sort(dim=1).values[:, number - 1 : number]
    # numpy selects with vector instructions: several times faster than kthvalue
    return torch.from_numpy(np.partition(scores.numpy(), number - 1, axis=1)[:, number - 1 : number].copy())


@dataclass(frozen=True)
class Granularity:
    """units of `block` weights; those in one `window` of `across` compete.

    kind: "layer", "per-row", "row", "column", "n:m" or "block".
    """

    kind: str
    n: int = 0  # kept of m
    m: int = 0
    height: int = 1
    width: int = 1

    def __str__(self) -> str:
        return {"n:m": f"{self.n}:{self.m}", "block": f"{self.height}x{self.width}"}.get(self.kind, self.kind)

    @property
    def divisor(self) -> tuple[int, int]:
        """(out, in) of a layer have to be multiples of this."""
        return (self.height, self.m or self.width)

    @property
    def sweep(self) -> int | None:
        """How many columns a column sweep may decide at once; None when the choice spans more than that."""
        if self.kind == "n:m":
            return self.m
        if self.kind in ("layer", "per-row"):
            return 0  # as many as the sweep likes
        if self.kind == "block" and self.height == 1:
            return self.width
        return None

    def units(self, scores: Tensor) -> Tensor:
        """Scores [out, in] -> [groups, units]."""
        out, width = scores.shape
        if self.kind == "layer":
            return scores.reshape(1, -1)
        if self.kind == "per-row":
            return scores
        if self.kind == "n:m":
            return scores.reshape(-1, self.m)
        if self.kind == "row":
            return scores.mean(1)[None]
        if self.kind == "column":
            return scores.mean(0)[None]
        tiles = scores.reshape(out // self.height, self.height, width // self.width, self.width)
        return tiles.mean((1, 3)).reshape(1, -1)

    def spread(self, units: Tensor, shape: tuple[int, int]) -> Tensor:
        """A decision per unit [groups, units] -> per weight [out, in]."""
        out, width = shape
        if self.kind == "row":
            return units.reshape(out, 1).expand(out, width)
        if self.kind == "column":
            return units.reshape(1, width).expand(out, width)
        if self.kind == "block":
            tiles = units.reshape(out // self.height, 1, width // self.width, 1)
            return tiles.expand(-1, self.height, -1, self.width).reshape(out, width)
        return units.reshape(out, width)


def parse(text: str) -> Granularity:
    """ "layer", "per-row", "row", "column", "2:4" (keeps 2 of 4), "16x16", "1x16". Raises SecateurError otherwise."""
    if text in ("layer", "per-row", "row", "column"):
        return Granularity(text)
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if 0 < n < m:
            return Granularity("n:m", n=n, m=m)
        raise SecateurError(f"pattern {text}: N:M keeps N of every M weights, so 0 < N < M (for example 2:4)")
    if (match := re.fullmatch(r"(\d+)x(\d+)", text)) and int(match[1]) * int(match[2]) > 1:
        return Granularity("block", height=int(match[1]), width=int(match[2]))
    raise SecateurError(
        f"unknown granularity {text!r}; known: layer, per-row, row, column, N:M (2:4), blocks (1x16, 16x16)"
    )


@dataclass(frozen=True)
class Choose:
    """Scores [out, in] -> keep mask [out, in]: removes a share of the units of each group, or all below a threshold.

    sparsity: share removed in [0, 1). threshold, where given, replaces it: units with a score below it go.
    fixed: a mask decided earlier, which then is the answer to everything.
    """

    granularity: Granularity
    sparsity: float = 0.0
    threshold: float | None = None
    fixed: Tensor | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        if bool(torch.isnan(scores).any()):
            raise SecateurError("importance scores are NaN: the weights or the calibration inputs are not finite")
        return self.between(scores, 0, scores.shape[1])

    def between(self, scores: Tensor, start: int, stop: int) -> Tensor:
        """The choice within columns start..stop of a sweep; scores: [out, stop - start]. The counts of consecutive
        calls add up to the count of the whole.
        """
        if self.fixed is not None:
            return self.fixed[:, start:stop]
        units = self.granularity.units(scores)
        shape = (scores.shape[0], scores.shape[1])
        if self.threshold is not None:
            return self.granularity.spread(units >= self.threshold, shape)
        each = units.shape[1]
        if self.granularity.kind == "n:m":
            number = self.granularity.m - self.granularity.n
        elif start == 0:
            number = count(self.sparsity, each)
        else:
            ratio = each / scores.shape[1]  # units of a group per column
            number = count(self.sparsity, round(ratio * stop)) - count(self.sparsity, round(ratio * start))
        return self.granularity.spread(~lowest(units, number), shape)

    def with_mask(self, keep: Tensor) -> Choose:
        """The same question with its answer already known."""
        return replace(self, fixed=keep)
