"""The laws of selection, against sorting in plain Python: exact counts, ties by index, N:M in every group, monotone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from problems import noise
from secateur.errors import SecateurError
from secateur.weights.granularity import Choose, Granularity, count, lowest, parse

KINDS = ["layer", "per-row", "row", "column", "2:4", "1:4", "4:8", "3:5", "7:20", "1x4", "1x3", "4x4", "3x2", "5x1"]
sparsities = st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.1, 0.25, 0.29, 0.5, 0.7, 0.75]))


@st.composite
def shapes(draw: st.DrawFn, granularity: Granularity, most: int = 12) -> tuple[int, int]:
    """A shape that the granularity divides."""
    height, width = granularity.divisor
    return draw(st.integers(1, most)) * height, draw(st.integers(1, max(2, most * 3 // width))) * width


@st.composite
def problems(draw: st.DrawFn, kinds: list[str] = KINDS, ties: bool | None = None) -> tuple[Granularity, Tensor]:
    """A granularity, and scores that it divides: whole numbers with many ties, or numbers that differ."""
    granularity = parse(draw(st.sampled_from(kinds)))
    out, width = draw(shapes(granularity))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    if draw(st.booleans()) if ties is None else ties:
        return granularity, torch.randint(0, draw(st.integers(1, 9)), (out, width), generator=generator).float()
    return granularity, torch.randperm(out * width, generator=generator).float().reshape(out, width)


def units(g: Granularity, out: int, width: int) -> list[list[list[tuple[int, int]]]]:
    """Groups of units of places: who competes, and who stands or falls together."""
    rows, columns = range(out), range(width)
    match g.kind:
        case "layer":
            return [[[(i, j)] for i in rows for j in columns]]
        case "per-row":
            return [[[(i, j)] for j in columns] for i in rows]
        case "n:m":
            return [[[(i, j + k)] for k in range(g.m)] for i in rows for j in range(0, width, g.m)]
        case "row":
            return [[[(i, j) for j in columns] for i in rows]]
        case "column":
            return [[[(i, j) for i in rows] for j in columns]]
    tiles = [(i, j) for i in range(0, out, g.height) for j in range(0, width, g.width)]
    return [[[(i + a, j + b) for a in range(g.height) for b in range(g.width)] for i, j in tiles]]


def sorted_out(g: Granularity, scores: Tensor, sparsity: float) -> Tensor:
    """What stays: the lowest units of each group go, the first of equals first."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    table = scores.tolist()
    for group in units(g, *scores.shape):
        number = g.m - g.n if g.kind == "n:m" else math.floor(sparsity * len(group) + 1e-9)
        order = sorted(range(len(group)), key=lambda u: (sum(table[i][j] for i, j in group[u]), u))
        for unit in order[:number]:
            for place in group[unit]:
                keep[place] = False
    return keep


@given(problems(), sparsities)
def test_equals_sorting(problem: tuple[Granularity, Tensor], sparsity: float):
    granularity, scores = problem
    keep = Choose(granularity, sparsity)(scores)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, sorted_out(granularity, scores, sparsity))
    assert torch.equal(keep, Choose(granularity, sparsity)(scores.t().contiguous().t()))  # as a sweep hands them over


@given(problems(), sparsities, sparsities)
def test_more_sparsity_keeps_a_subset(problem: tuple[Granularity, Tensor], one: float, other: float):
    granularity, scores = problem
    low, high = sorted((one, other))
    assert bool((Choose(granularity, low)(scores) | ~Choose(granularity, high)(scores)).all())


@given(problems(["layer", "per-row", "column", "2:4", "3:5", "1x4"], ties=False), sparsities, st.randoms())
def test_permuting_rows_permutes_the_mask(problem: tuple[Granularity, Tensor], sparsity: float, random):
    granularity, scores = problem
    order = list(range(len(scores)))
    random.shuffle(order)
    choose = Choose(granularity, sparsity)
    if granularity.kind == "column":
        assert torch.equal(choose(scores[order]), choose(scores))
    elif granularity.kind != "block":  # sums of blocks may tie
        assert torch.equal(choose(scores[order]), choose(scores)[order])


@given(problems(), sparsities)
def test_kept_units_are_not_below_removed_ones(problem: tuple[Granularity, Tensor], sparsity: float):
    granularity, scores = problem
    keep, table = Choose(granularity, sparsity)(scores), scores.tolist()
    for group in units(granularity, *scores.shape):
        found = [(sum(table[i][j] for i, j in unit), {bool(keep[place]) for place in unit}) for unit in group]
        assert all(len(answers) == 1 for _, answers in found), "a unit stands or falls together"
        kept = [score for score, answers in found if answers == {True}]
        gone = [score for score, answers in found if answers == {False}]
        assert not kept or not gone or min(kept) >= max(gone)


@given(problems(["layer", "per-row", "2:4", "3:5", "7:20", "1x4", "1x3"]), sparsities, st.data())
def test_choices_between_columns_add_up(problem: tuple[Granularity, Tensor], sparsity: float, data: st.DataObject):
    """Whatever the cuts, the counts of consecutive columns make the exact count of the whole."""
    granularity, scores = problem
    choose, width = Choose(granularity, sparsity), scores.shape[1]
    step = granularity.sweep or 1
    cuts = data.draw(st.lists(st.integers(1, width // step).map(lambda c: c * step), max_size=6))
    edges = sorted({0, width, *cuts})
    parts = [choose.between(scores[:, a:b], a, b) for a, b in pairwise(edges)]
    together, whole = torch.cat(parts, 1), choose(scores)
    if granularity.kind in ("per-row", "n:m"):
        assert torch.equal(together.sum(1), whole.sum(1))
    assert int(together.sum()) == int(whole.sum())


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 10**6))
def test_count_is_the_whole_number_below(sparsity: float, number: int):
    found = count(sparsity, number)
    assert 0 <= found <= number
    assert found <= sparsity * number + 1e-9 < found + 1


def test_count_forgives_the_rounding_of_the_product():
    assert 0.29 * 100 < 29
    assert count(0.29, 100) == 29
    assert all(count(k / n, n) == k for n in range(1, 200) for k in range(n))


@given(
    st.integers(1, 40),
    st.integers(-1, 42),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.5, math.inf]), min_size=120, max_size=120),
)
def test_lowest(units: int, number: int, values: list[float]):
    scores = torch.tensor(values[: 3 * units]).reshape(3, units)
    found = lowest(scores, number)
    for row, gone in zip(scores.tolist(), found.tolist(), strict=True):
        order = sorted(range(units), key=lambda i: (row[i], i))[: max(number, 0)]
        assert [i for i in range(units) if gone[i]] == sorted(order)


@pytest.mark.parametrize("kind", ["layer", "per-row", "row", "column", "1x4", "2x2"])
def test_a_threshold_removes_what_is_below_it(kind: str):
    scores, granularity = torch.arange(32.0).reshape(4, 8) / 2, parse(kind)
    keep = Choose(granularity, threshold=5.5)(scores)
    for group in units(granularity, 4, 8):
        for unit in group:
            mean = sum(float(scores[place]) for place in unit) / len(unit)
            assert all(bool(keep[place]) == (mean >= 5.5) for place in unit)


def test_a_fixed_mask_is_the_answer_to_everything():
    keep = noise(3, 8, seed=0) > 0
    choose = Choose(parse("2:4")).with_mask(keep)
    assert torch.equal(choose(noise(3, 8, seed=1)), keep)
    assert torch.equal(choose.between(noise(3, 4, seed=1), 4, 8), keep[:, 4:])


def test_nan_scores_are_an_error():
    for kind in ("layer", "per-row", "row", "1:2"):
        with pytest.raises(SecateurError, match="NaN"):
            Choose(parse(kind), 0.5)(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("text", KINDS)
def test_granularities_print_as_they_are_written(text: str):
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4:2", "0 < N < M"),
        ("0:4", "0 < N < M"),
        ("2:2", "0 < N < M"),
        ("1x1", "unknown granularity '1x1'"),
        ("0x4", "unknown granularity"),
        ("filter", "known: layer, per-row, row, column, N:M"),
        ("", "unknown granularity ''"),
        ("2:4:8", "unknown granularity"),
        ("-1:4", "unknown granularity"),
        ("2:4 ", "unknown granularity"),
    ],
)
def test_unknown_granularities_are_errors(text: str, message: str):
    with pytest.raises(SecateurError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("text", "divisor", "sweep"),
    [
        ("layer", (1, 1), 0),
        ("per-row", (1, 1), 0),
        ("2:4", (1, 4), 4),
        ("1x16", (1, 16), 16),
        ("4x16", (4, 16), None),
        ("row", (1, 1), None),
        ("column", (1, 1), None),
    ],
)
def test_what_divides_and_what_a_sweep_may_decide(text: str, divisor: tuple[int, int], sweep: int | None):
    assert parse(text).divisor == divisor
    assert parse(text).sweep == sweep
