"""The sweep against optimal brain surgery with fresh inverses, column by column, in float64."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from problems import DAMP, correlated, gram, hessian, inverse_rows, noise, random_mask
from secateur.errors import SecateurError
from secateur.weights.granularity import Choose, count, parse
from secateur.weights.linalg import inverse_factor
from secateur.weights.sweep import BLOCK, sweep_matrix

OUT = 5


@cache
def problem(width: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Weights, the factor, and for each column j the first row of the inverse of H[j:, j:]; all in float64."""
    x = correlated(width + 20, width, seed=width)
    return noise(OUT, width, seed=width + 7).double(), inverse_factor(gram(x), DAMP)[0], inverse_rows(hessian(x))


def remove(w: Tensor, j: int, gone: Tensor, rows: list[Tensor]) -> None:
    """Take column j out of the rows in `gone`; the columns to the right make up for it."""
    w[:, j:] -= (w[:, j] * gone / rows[j][0])[:, None] * rows[j]
    w[gone, j] = 0


def with_mask(w: Tensor, keep: Tensor, rows: list[Tensor]) -> Tensor:
    w = w.clone()
    for j in range(w.shape[1]):
        remove(w, j, ~keep[:, j], rows)
    return w


def choosing(w: Tensor, choose: Choose, rows: list[Tensor], step: int) -> tuple[Tensor, Tensor]:
    """The plain loop: every `step` columns, from the start of each block, decide by w^2 / [H^-1]_jj and remove."""
    w, width = w.clone(), w.shape[1]
    keep = torch.ones_like(w, dtype=torch.bool)
    block = max(step, BLOCK // step * step)
    for start in range(0, width, block):
        for first in range(start, min(start + block, width), step):
            last = min(first + step, start + block, width)
            scores = torch.stack([w[:, j] ** 2 / rows[j][0] for j in range(first, last)], 1)
            keep[:, first:last] = choose.between(scores, first, last)
            for j in range(first, last):
                remove(w, j, ~keep[:, j], rows)
    return w, keep


@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 33, 127, 128, 129, 150])
def test_a_given_mask_equals_removal_with_fresh_inverses(width: int):
    weight, factor, rows = problem(width)
    keep = random_mask((OUT, width), 0.5)
    found, kept = sweep_matrix(weight, factor, Choose(parse("layer")).with_mask(keep))
    assert torch.equal(kept, keep)
    torch.testing.assert_close(found, with_mask(weight, keep, rows), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("width", [17, 150])
def test_in_float32_to_float32_s_rounding(width: int):
    weight, factor, rows = problem(width)
    keep = random_mask((OUT, width), 0.5)
    found, _ = sweep_matrix(weight.float(), factor.float(), Choose(parse("layer")).with_mask(keep))
    expected = with_mask(weight, keep, rows)
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-4


CHOICES = [  # granularity, width, columns decided at once
    ("layer", 100, 128),
    ("layer", 300, 128),
    ("per-row", 150, 128),
    ("2:4", 132, 4),
    ("1:4", 40, 4),
    ("4:8", 136, 8),
    ("3:5", 130, 5),
    ("1:3", 141, 3),
    ("10:20", 140, 20),
    ("70:100", 200, 100),
    ("60:150", 150, 150),
    ("1x4", 132, 4),
    ("1x24", 144, 24),
    ("1x150", 150, 150),
]


@pytest.mark.parametrize("sparsity", [0.3, 0.7])
@pytest.mark.parametrize(("granularity", "width", "step"), CHOICES)
def test_choosing_on_the_way_equals_the_plain_loop(granularity: str, width: int, step: int, sparsity: float):
    weight, factor, rows = problem(width)
    choose = Choose(parse(granularity), sparsity)
    found, keep = sweep_matrix(weight, factor, choose)
    expected, kept = choosing(weight, choose, rows, step)
    assert torch.equal(keep, kept)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.97])
@pytest.mark.parametrize("granularity", ["layer", "per-row", "1x4"])
def test_the_count_is_exact(granularity: str, sparsity: float):
    weight, factor, _ = problem(300)
    found, keep = sweep_matrix(weight.float(), factor.float(), Choose(parse(granularity), sparsity))
    unit = 4 if granularity == "1x4" else 1
    if granularity == "per-row":
        assert (~keep).sum(1).tolist() == [count(sparsity, 300)] * OUT
    else:
        assert int((~keep).sum()) == unit * count(sparsity, OUT * 300 // unit)
    assert bool((found[~keep] == 0).all())
    if sparsity == 0:
        assert torch.equal(found, weight.float())


@pytest.mark.parametrize("granularity", ["row", "column", "5x4"])
def test_a_mask_that_is_wider_than_a_block_is_taken_as_given(granularity: str):
    weight, factor, rows = problem(150 if granularity != "5x4" else 132)
    choose = Choose(parse(granularity), 0.5)
    keep = choose(weight.square())
    found, kept = sweep_matrix(weight, factor, choose.with_mask(keep))
    assert torch.equal(kept, keep)
    torch.testing.assert_close(found, with_mask(weight, keep, rows), rtol=1e-7, atol=1e-9)


def test_rows_do_not_know_of_each_other():
    weight, factor, _ = problem(150)
    order = torch.tensor([3, 0, 4, 1, 2])
    found, keep = sweep_matrix(weight, factor, Choose(parse("per-row"), 0.6))
    turned, mask = sweep_matrix(weight[order], factor, Choose(parse("per-row"), 0.6))
    assert torch.equal(mask, keep[order])
    torch.testing.assert_close(turned, found[order])


def test_the_caller_s_memory_is_left_alone():
    weight, factor, _ = problem(33)
    for form in (weight, weight.t().contiguous().t()):
        before, inverse = form.clone(), factor.clone()
        sweep_matrix(form, factor, Choose(parse("layer"), 0.5))
        assert torch.equal(form, before)
        assert torch.equal(factor, inverse)


def test_what_is_not_finite_is_an_error():
    weight, factor, _ = problem(17)
    weight = weight.clone()
    weight[2, 3] = float("inf")
    with pytest.raises(SecateurError, match="NaN or Inf"):
        sweep_matrix(weight, factor, Choose(parse("layer"), 0.5).with_mask(random_mask((OUT, 17), 0.5)))
