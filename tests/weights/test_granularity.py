"""The laws of selection: exact counts, N:M in every group, monotone, deterministic, ties by index, rows independent."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.errors import SecateurError
from secateur.weights.granularity import Choose, count, lowest, parse

sparsities = st.floats(0, 0.999)


@st.composite
def scores(draw: st.DrawFn, multiple: int = 1) -> Tensor:
    """Scores [out, in] with many ties."""
    out, width = draw(st.integers(1, 6)) * multiple, draw(st.integers(1, 12)) * multiple
    values = draw(st.lists(st.integers(0, 9), min_size=out * width, max_size=out * width))
    return torch.tensor(values, dtype=torch.float32).reshape(out, width)


def brute_force(row: list[float], number: int) -> list[bool]:
    """True where one of the `number` lowest stands, ties by index."""
    order = sorted(range(len(row)), key=lambda i: (row[i], i))[:number]
    return [i in order for i in range(len(row))]


@given(scores(), sparsities)
def test_layer_is_exact_and_breaks_ties_by_index(values, sparsity):
    gone = ~Choose(parse("layer"), sparsity)(values)
    number = math.floor(sparsity * values.numel() + 1e-9)
    assert gone.flatten().tolist() == brute_force(values.flatten().tolist(), number)


@given(scores(), sparsities)
def test_per_row_is_exact_in_every_row(values, sparsity):
    gone = ~Choose(parse("per-row"), sparsity)(values)
    number = math.floor(sparsity * values.shape[1] + 1e-9)
    assert gone.tolist() == [brute_force(row, number) for row in values.tolist()]


@given(st.sampled_from([(1, 2), (2, 4), (4, 8), (1, 4), (3, 5), (2, 20)]), st.integers(1, 4), st.integers(1, 4), st.data())
def test_n_of_m_in_every_group(pattern, out, groups, data):
    n, m = pattern
    values = data.draw(st.lists(st.integers(0, 5), min_size=out * groups * m, max_size=out * groups * m))
    table = torch.tensor(values, dtype=torch.float32).reshape(out, groups * m)
    keep = Choose(parse(f"{n}:{m}"))(table)
    for group, kept in zip(table.reshape(-1, m).tolist(), keep.reshape(-1, m).tolist(), strict=True):
        assert [not k for k in kept] == brute_force(group, m - n)


@given(scores(multiple=4), sparsities)
def test_blocks_stand_or_fall_together(values, sparsity):
    keep = Choose(parse("2x4"), sparsity)(values)
    tiles = keep.reshape(values.shape[0] // 2, 2, values.shape[1] // 4, 4).permute(0, 2, 1, 3).reshape(-1, 8)
    assert bool((tiles.all(1) | ~tiles.any(1)).all())
    assert int((~tiles[:, 0]).sum()) == count(sparsity, len(tiles))


@given(scores(), sparsities, st.sampled_from(["row", "column"]))
def test_rows_and_columns(values, sparsity, kind):
    keep = Choose(parse(kind), sparsity)(values)
    lines = keep if kind == "row" else keep.t()
    assert bool((lines.all(1) | ~lines.any(1)).all())
    assert int((~lines[:, 0]).sum()) == count(sparsity, len(lines))


@given(scores(), sparsities, sparsities, st.sampled_from(["layer", "per-row"]))
def test_more_sparsity_keeps_a_subset(values, one, other, kind):
    low, high = sorted((one, other))
    more, fewer = Choose(parse(kind), low)(values), Choose(parse(kind), high)(values)
    assert bool((more | ~fewer).all())


@given(scores(), sparsities, st.randoms())
def test_permuting_rows_permutes_the_mask(values, sparsity, random):
    order = list(range(len(values)))
    random.shuffle(order)
    keep = Choose(parse("per-row"), sparsity)(values)
    assert torch.equal(Choose(parse("per-row"), sparsity)(values[order]), keep[order])


@given(scores(), sparsities, st.sampled_from(["layer", "per-row"]), st.integers(1, 5))
def test_choices_of_a_sweep_add_up(values, sparsity, kind, step):
    choose, width = Choose(parse(kind), sparsity), values.shape[1]
    parts = [choose.between(values[:, i : i + step], i, min(i + step, width)) for i in range(0, width, step)]
    assert int((~torch.cat(parts, 1)).sum()) == int((~choose(values)).sum())


@given(scores())
def test_kept_magnitudes_are_not_below_removed_ones(values):
    keep = Choose(parse("layer"), 0.5)(values)
    if keep.any() and not keep.all():
        assert values[keep].min() >= values[~keep].max()


def test_a_threshold_removes_what_is_below_it():
    values = torch.tensor([[0.1, 0.5, 0.5], [0.9, 0.2, 0.0]])
    keep = Choose(parse("layer"), threshold=0.5)(values)
    assert keep.tolist() == [[False, True, True], [True, False, False]]


def test_nan_scores_are_an_error():
    with pytest.raises(SecateurError, match="NaN"):
        Choose(parse("layer"), 0.5)(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "1x1", "filter", "", "2:4:8"])
def test_unknown_granularities_are_errors(text):
    with pytest.raises(SecateurError):
        parse(text)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 5))
def test_lowest_of_long_groups(units, number, seed):
    values = torch.randint(0, 4, (3, units + 20), generator=torch.Generator().manual_seed(seed)).float()
    assert lowest(values, number).tolist() == [brute_force(row, number) for row in values.tolist()]
