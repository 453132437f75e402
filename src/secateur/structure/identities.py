"""Identities of indices: which indices of which tensors live or die together.

An index of a dimension is an integer here, and a dimension an array of them, or None where no index of it can ever be
removed (batch, sequence, space). Three facts can be stated: two indices are the same; an index is a product (it dies when
one of its factors dies, as the channel (head, d) dies with the head); an index is protected. Everything is done on whole
arrays, so that the cost follows the number of statements and not the width. Knows nothing of tensors and models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Dim = Indices | None
DEPTH = 24  # of products in products; deeper is a product that contains itself
MOST = 64  # factors of an index; one with more contains itself twice


class Identities:
    """Union-find over indices, with products. Index 0 is never given out."""

    def __init__(self) -> None:
        self._used = 1
        self._parent = np.zeros(1024, np.int64)
        self._left = np.full(1024, -1, np.int64)  # factors of a product; -1: none
        self._right = np.full(1024, -1, np.int64)
        self._inner = np.zeros(1024, np.int64)  # how many values the right factor runs through
        self._why = np.zeros(1024, np.int64)  # the reason why an index is protected; 0: it is not
        self.reasons: list[str] = [""]
        self._reason_ids: dict[str, int] = {"": 0}

    def copy(self) -> Identities:
        """The same statements, to be added to elsewhere."""
        twin = Identities()
        twin._used, twin.reasons, twin._reason_ids = self._used, list(self.reasons), dict(self._reason_ids)
        for name in ("_parent", "_left", "_right", "_inner", "_why"):
            setattr(twin, name, getattr(self, name).copy())
        return twin

    # Making

    def new(self, count: int) -> Indices:
        """Indices of their own."""
        first, self._used = self._used, self._used + count
        if self._used > len(self._parent):
            self._grow()
        made = np.arange(first, self._used)
        self._parent[made] = made
        return made

    def _grow(self) -> None:
        more = max(self._used, 2 * len(self._parent)) - len(self._parent)
        for name, fill in (("_parent", 0), ("_left", -1), ("_right", -1), ("_inner", 0), ("_why", 0)):
            setattr(self, name, np.concatenate([getattr(self, name), np.full(more, fill, np.int64)]))

    def product(self, outer: Dim, inner: Dim, sizes: tuple[int, int]) -> Dim:
        """Row-major pairs of two dimensions, as flattening makes them: [sizes[0] * sizes[1]]."""
        many, few = sizes
        outer = None if outer is None or self._all_protected(outer) else self._essence(outer)
        inner = None if inner is None or self._all_protected(inner) else self._essence(inner)
        if outer is None or inner is None:
            only = inner if outer is None else outer
            if only is None:
                return None
            return np.tile(only, many) if outer is None else np.repeat(only, few)
        if many == 1 or few == 1:  # a single index cannot be removed
            self.protect(outer if many == 1 else inner, "a dimension of size 1")
            return inner if many == 1 else outer
        if (factors := self._as_grid(inner)) is not None:  # ((a, b), c), never (a, (b, c))
            left, right = factors
            return self.product(self.product(outer, left, (many, len(left))), right, (many * len(left), len(right)))
        made = self.new(many * few)
        self._left[made], self._right[made], self._inner[made] = np.repeat(outer, few), np.tile(inner, many), few
        return made

    def split(self, whole: Dim, inner: int) -> tuple[Dim, Dim]:
        """The factors of a dimension that is viewed as [len / inner, inner]."""
        if whole is None or self._all_protected(whole):
            return None, None
        whole = self._essence(whole)
        grid = whole.reshape(-1, inner)
        if (grid == grid[0]).all():
            return None, grid[0]
        if (grid == grid[:, :1]).all():
            return grid[:, 0], None
        if (factors := self._as_grid(whole, inner)) is not None:
            return factors
        period = len(np.unique(whole))
        if period < len(whole):
            return self._split_repeated(whole, period, inner)
        outer, inside = self.new(len(grid)), self.new(inner)
        self.same(whole, self.product(outer, inside, (len(grid), inner)))
        return outer, inside

    def _split_repeated(self, whole: Indices, period: int, inner: int) -> tuple[Dim, Dim]:
        times = len(whole) // period
        if len(whole) % period == 0 and period % inner == 0 and np.array_equal(whole, np.tile(whole[:period], times)):
            outer, inside = self.split(whole[:period], inner)
            return None if outer is None else np.tile(outer, times), inside
        if len(whole) % period == 0 and inner % times == 0 and np.array_equal(whole, np.repeat(whole[::times], times)):
            outer, inside = self.split(whole[::times], inner // times)
            return outer, None if inside is None else np.repeat(inside, times)
        self.protect(whole, "a view that cuts across repeated channels")
        return None, None

    def grid(self, dim: Indices, inner: int) -> tuple[Indices, Indices] | None:
        """The two factors of a dimension that was made of them, [len / inner] and [inner]; None for another one."""
        return self._as_grid(self._essence(dim), inner)

    def _as_grid(self, roots: Indices, inner: int | None = None) -> tuple[Indices, Indices] | None:
        """(rows, columns) where the indices are all products of a row and a column, in order."""
        if (self._left[roots] < 0).any():
            return None
        width = int(self._inner[roots[0]])
        if (inner is not None and width != inner) or len(roots) % width or (self._inner[roots] != width).any():
            return None
        left = self.find(self._left[roots]).reshape(-1, width)
        right = self.find(self._right[roots]).reshape(-1, width)
        if (left == left[:, :1]).all() and (right == right[0]).all():
            return left[:, 0], right[0]
        return None

    # Stating

    def same(self, one: Dim, other: Dim) -> None:
        """State that two dimensions live and die together, index by index."""
        todo: list[tuple[Dim, Dim]] = [(one, other)]
        while todo:
            a, b = todo.pop()
            if a is None or b is None:
                for dim in (a, b):
                    self.protect(dim, "tied to data: an input, the batch, the sequence or space")
                continue
            a, b = self._essence(a), self._essence(b)
            if np.array_equal(a, b):
                continue
            if (refined := self._refine(a, b)) is not None:
                todo += refined
                continue
            apart = a != b
            todo += self._unite(a[apart], b[apart])

    def _refine(self, a: Indices, b: Indices) -> list[tuple[Dim, Dim]] | None:
        """Two grids of other widths, (4, 128) and (8, 64), become grids of their common factors (4, 2, 64)."""
        one, other = self._as_grid(a), self._as_grid(b)
        if one is None or other is None or len(one[1]) == len(other[1]):
            return None
        if len(one[1]) < len(other[1]):
            one, other = other, one
        few = len(other[1])
        if len(one[1]) % few:
            return [(None, a), (None, b)]
        left, right = self.split(one[1], few)
        return [(self.product(one[0], left, (len(one[0]), len(one[1]) // few)), other[0]), (right, other[1])]

    def _unite(self, a: Indices, b: Indices) -> list[tuple[Dim, Dim]]:
        """Union of roots, pair by pair. Returns what follows for the factors of products."""
        roots = np.unique(np.concatenate([a, b]))
        while True:
            low, high = np.minimum(a, b), np.maximum(a, b)
            np.minimum.at(self._parent, high, low)
            a, b = self.find(a), self.find(b)
            if np.array_equal(a, b):
                break
        after, why = self.find(roots), self._why[roots]
        np.maximum.at(self._why, after, why)
        follows: list[tuple[Dim, Dim]] = []
        products = self._left[roots] >= 0
        old, new = roots[products], after[products]
        order = np.argsort(new, kind="stable")
        old, new = old[order], new[order]
        first = np.concatenate([[True], new[1:] != new[:-1]]) if len(new) else np.zeros(0, bool)
        chief = old[first][np.cumsum(first) - 1] if len(new) else old
        twins = np.flatnonzero(old != chief)
        equal = self._inner[old[twins]] == self._inner[chief[twins]]
        same, clash = twins[equal], twins[~equal]
        follows.append((self._left[old[same]], self._left[chief[same]]))
        follows.append((self._right[old[same]], self._right[chief[same]]))
        for part in (old[clash], chief[clash]):  # factors that do not line up
            follows += [(None, self._left[part]), (None, self._right[part])]
        for table in (self._left, self._right, self._inner):
            table[new[first]] = table[old[first]]
        struck = np.unique(after[self._why[after] > 0])
        struck = struck[self._left[struck] >= 0]
        if len(struck):
            self._protect_factors(struck)
        return [(x, y) for x, y in follows if x is None or len(x)]

    def protect(self, dim: Dim, reason: str) -> None:
        """State that no index of a dimension may be removed. The first reason given for an index stays."""
        if dim is None or not len(dim):
            return
        number = self._reason_ids.setdefault(reason, len(self.reasons))
        if number == len(self.reasons):
            self.reasons.append(reason)
        roots = np.unique(self.find(dim))
        roots = roots[self._why[roots] == 0]
        self._why[roots] = number
        self._protect_factors(roots)

    def _protect_factors(self, roots: Indices) -> None:
        """A product that never dies has factors that never die."""
        while len(roots := roots[self._left[roots] >= 0]):
            why = self._why[roots]
            fresh = []
            for factor in (self.find(self._left[roots]), self.find(self._right[roots])):
                free = self._why[factor] == 0
                self._why[factor[free]] = why[free]
                fresh.append(factor[free])
            roots = np.unique(np.concatenate(fresh))

    # Asking

    @property
    def count(self) -> int:
        """One more than the largest index."""
        return self._used

    def find(self, dim: Indices) -> Indices:
        """The root of each index; roots are equal where indices are the same."""
        root = self._parent[dim]
        while True:
            up = self._parent[root]
            if np.array_equal(up, root):
                break
            root = up
        self._parent[dim] = root
        return root

    def _essence(self, dim: Indices) -> Indices:
        """Roots, with products of which one factor can never die replaced by the other factor."""
        roots = self.find(dim)
        for _ in range(DEPTH):
            product = self._left[roots] >= 0
            left, right = (self.find(np.where(product, table[roots], 0)) for table in (self._left, self._right))
            only_right = product & (self._why[left] > 0)
            only_left = product & ~only_right & (self._why[right] > 0)
            if not (only_left | only_right).any():
                break
            new = np.where(only_right, right, np.where(only_left, left, roots))
            self._left[roots[(only_left | only_right) & (new == roots)]] = -1  # itself times what never dies: itself
            roots = new
        return roots

    def why(self, dim: Indices) -> list[str]:
        """The reasons for which indices of a dimension, or factors of them, are protected, each once."""
        roots, found = np.unique(self.find(dim)), set()
        for _ in range(DEPTH):
            found |= set(self._why[roots].tolist()) - {0}
            roots = roots[self._left[roots] >= 0]
            if not len(roots):
                break
            roots = np.unique(np.concatenate([self.find(self._left[roots]), self.find(self._right[roots])]))
        return [self.reasons[number] for number in sorted(found)]

    def free(self, dim: Dim) -> bool:
        """Whether any index of a dimension can be removed."""
        return dim is not None and any((column >= 0).any() for column in self.factors(dim))

    def protected(self, dim: Indices) -> NDArray[np.bool_]:
        """Which indices of a dimension are protected."""
        return self._why[self.find(dim)] > 0

    def _all_protected(self, dim: Indices) -> bool:
        return bool((self._why[self.find(dim)] > 0).all())

    def factors(self, dim: Indices, protected: bool = False) -> list[Indices]:
        """The free factors of each index, the outer ones first, as columns of roots; -1 where an index has no more of them.

        protected: those that are not free as well.
        """
        todo, found = [(self.find(dim), False)], []
        for _ in range(DEPTH):
            if all(settled for _, settled in todo):
                return [column for column, _ in todo]
            if len(todo) > MOST:
                break
            found, todo = todo, []
            for column, settled in found:
                there = column >= 0
                free = there if protected else there & (self._why[column] == 0)
                product = free & (self._left[column] >= 0)
                if settled or not product.any():
                    todo.append((column if settled else np.where(free, column, -1), True))
                    continue
                safe = np.where(product, column, 0)
                todo.append((np.where(product, self._safe_find(self._left[safe]), column), False))
                todo.append((np.where(product, self._safe_find(self._right[safe]), -1), False))
        for column, _ in todo:
            self.protect(column[column >= 0], "a view that makes a dimension a part of itself")
        return self.factors(dim)

    def leaves(self, dim: Indices) -> Indices:
        """The free factors of all indices together, each once."""
        roots, found = np.unique(self.find(dim)), [np.zeros(0, np.int64)]
        for _ in range(DEPTH):
            roots = roots[self._why[roots] == 0]
            product = self._left[roots] >= 0
            found.append(roots[~product])
            if not product.any():
                break
            inner = np.concatenate([self._left[roots[product]], self._right[roots[product]]])
            roots = np.unique(self.find(inner))
        return np.unique(np.concatenate(found))

    def _safe_find(self, dim: Indices) -> Indices:
        return np.where(dim >= 0, self.find(np.maximum(dim, 0)), -1)


def concatenated(ids: Identities, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
    """Dimensions behind one another. What cannot be removed gets indices that are protected."""
    if all(dim is None for dim in dims):
        return None
    parts = []
    for dim, size in zip(dims, sizes, strict=True):
        if dim is None:
            dim = ids.new(size)
            ids.protect(dim, "tied to data: an input, the batch, the sequence or space")
        parts.append(dim)
    return np.concatenate(parts)
