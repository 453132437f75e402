"""Identities against what their statements mean: whatever free factors die, every statement has to hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.structure.identities import Identities, concatenated

SIZES = (2, 3, 4, 6)


class Statements:
    """Random dimensions with random statements, written down to be checked afterwards."""

    def __init__(self, data: st.DataObject) -> None:
        self.ids = Identities()
        self.dims: list[np.ndarray] = [self.ids.new(data.draw(st.sampled_from(SIZES))) for _ in range(4)]
        self.same: list[tuple[np.ndarray, np.ndarray]] = []
        self.products: list[tuple[np.ndarray, np.ndarray | None, np.ndarray | None, int]] = []
        self.protected: list[np.ndarray] = []
        for _ in range(data.draw(st.integers(1, 7))):
            getattr(self, data.draw(st.sampled_from(["_equal", "_product", "_split", "_protect", "_cat"])))(data)

    def _pick(self, data: st.DataObject) -> np.ndarray:
        return self.dims[data.draw(st.integers(0, len(self.dims) - 1))]

    def _equal(self, data: st.DataObject) -> None:
        one = self._pick(data)
        like = [dim for dim in self.dims if len(dim) == len(one)]
        other = like[data.draw(st.integers(0, len(like) - 1))]
        if data.draw(st.booleans()):
            other = other[::-1]
        self.ids.same(one, other)
        self.same.append((one, other))

    def _product(self, data: st.DataObject) -> None:
        one, other = self._pick(data), self._pick(data)
        if len(one) * len(other) <= 96:
            made = self.ids.product(one, other, (len(one), len(other)))
            if made is not None:
                self.dims.append(made)
                self.products.append((made, one, other, len(other)))

    def _split(self, data: st.DataObject) -> None:
        whole = self._pick(data)
        inner = data.draw(st.sampled_from([n for n in (2, 3, 4, 6, 12) if len(whole) % n == 0] or [len(whole)]))
        outer, inside = self.ids.split(whole, inner)
        self.products.append((whole, outer, inside, inner))
        self.dims += [dim for dim in (outer, inside) if dim is not None and len(dim) > 1]

    def _protect(self, data: st.DataObject) -> None:
        dim = self._pick(data)[: data.draw(st.integers(1, 2))]
        self.ids.protect(dim, "a test")
        self.protected.append(dim)

    def _cat(self, data: st.DataObject) -> None:
        one, other = self._pick(data), self._pick(data)
        if len(one) + len(other) <= 96:
            joined = concatenated(self.ids, [one, other], [len(one), len(other)])
            assert joined is not None
            self.dims.append(joined)


def alive(ids: Identities, dim: np.ndarray | None, dead: set[int], size: int) -> np.ndarray:
    if dim is None:
        return np.ones(size, bool)
    found = np.ones(len(dim), bool)
    for column in ids.factors(dim):
        found &= ~np.isin(column, list(dead))
    return found


@given(st.data())
def test_every_statement_holds_whatever_dies(data):
    made = Statements(data)
    ids = made.ids
    free = sorted({int(r) for dim in made.dims for column in ids.factors(dim) for r in column if r >= 0})
    dead = {root for root in free if data.draw(st.booleans())}
    for one, other in made.same:
        assert (alive(ids, one, dead, len(one)) == alive(ids, other, dead, len(other))).all()
    for whole, outer, inside, inner in made.products:
        rows = alive(ids, outer, dead, len(whole) // inner)
        columns = alive(ids, inside, dead, inner)
        assert (alive(ids, whole, dead, len(whole)).reshape(-1, inner) == rows[:, None] & columns).all()
    for dim in made.protected:
        assert alive(ids, dim, dead, len(dim)).all()


def test_a_split_finds_the_factors_of_a_product():
    ids = Identities()
    heads, size = ids.new(3), ids.new(4)
    outer, inner = ids.split(ids.product(heads, size, (3, 4)), 4)
    assert (outer == heads).all()
    assert (inner == size).all()


def test_two_views_of_a_dimension_share_their_common_factors():
    """[24] seen as (4, 6) and as (8, 3): then 4, 2 and 3 are free, and nothing else."""
    ids = Identities()
    whole = ids.new(24)
    a, _ = ids.split(whole, 6)
    b, c = ids.split(whole, 3)
    ids.same(whole, ids.product(b, c, (8, 3)))
    assert {len(np.unique(column)) for column in ids.factors(whole)} == {4, 2, 3}
    assert a is not None
    assert not ids.protected(a).any()


def test_views_without_common_factors_are_protected():
    ids = Identities()
    whole = ids.new(24)
    ids.split(whole, 4)
    ids.split(whole, 3)
    ids.split(whole, 8)
    ids.split(whole, 6)
    free = [column for column in ids.factors(whole) if (column >= 0).any()]
    dead = {int(free[0][0])} if free else set()
    grid = alive(ids, whole, dead, 24)
    for inner in (4, 3, 8, 6):  # still a rectangle in every view
        rows, columns = grid.reshape(-1, inner).any(1), grid.reshape(-1, inner).any(0)
        assert (grid.reshape(-1, inner) == rows[:, None] & columns).all()


def test_tied_to_data_is_protected_and_says_so():
    ids = Identities()
    width = ids.new(5)
    ids.same(width, None)
    assert ids.protected(width).all()
    assert ids.why(width) == ["tied to data: an input, the batch, the sequence or space"]


def test_a_product_with_data_dies_with_its_channel():
    ids = Identities()
    channels = ids.new(3)
    flat = ids.product(channels, None, (3, 4))
    assert flat is not None
    assert (ids.factors(flat)[0] == np.repeat(channels, 4)).all()


def test_statements_do_not_grow_with_the_width():
    """As many array operations for a wide dimension as for a narrow one."""

    def operations(width: int) -> int:
        ids = Identities()
        count = 0
        find = ids.find

        def counted(dim):
            nonlocal count
            count += 1
            return find(dim)

        ids.find = counted  # type: ignore[method-assign]
        one, other = ids.new(width), ids.new(width)
        ids.same(one, other)
        outer, inner = ids.split(one, 16)
        ids.same(ids.product(outer, inner, (width // 16, 16)), other)
        ids.factors(one)
        return count

    assert operations(64) == operations(65536)


@pytest.mark.parametrize("size", [2, 3])
def test_a_dimension_that_contains_itself_twice_is_protected_at_once(size):
    """Its factors would double with every step into it."""
    ids = Identities()
    whole = ids.new(size * size)
    ids.same(whole, ids.product(whole[:size], whole[-size:], (size, size)))
    assert not ids.free(whole)
    assert ids.why(whole) == ["a view that makes a dimension a part of itself"]


@given(st.data())
def test_leaves_are_the_free_factors(data):
    ids, dims = (made := Statements(data)).ids, made.dims
    columns = [column for dim in dims for column in ids.factors(dim)]
    want = {int(root) for column in columns for root in column if root >= 0}
    assert set(ids.leaves(np.concatenate(dims)).tolist()) == want
