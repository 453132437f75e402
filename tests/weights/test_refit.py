"""Refit against normal equations solved row by row in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from problems import DAMP, correlated, error, gram, hessian, least_squares, noise, random_mask
from secateur.weights.granularity import Choose, parse
from secateur.weights.refit import refit_matrix


def refit(weight: Tensor, x: Tensor, keep: Tensor, damp: float = DAMP, start: Tensor | None = None) -> Tensor:
    found, mask = refit_matrix(weight, gram(x).float(), Choose(parse("layer")).with_mask(keep), damp, start)
    assert torch.equal(mask, keep)
    assert bool((found[~keep] == 0).all())
    return found


@given(
    out=st.integers(1, 6),
    width=st.integers(1, 24),
    share=st.sampled_from([0.1, 0.5, 0.9]),
    damp=st.sampled_from([0.001, 0.01, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_normal_equations_are_solved(out: int, width: int, share: float, damp: float, seed: int):
    weight, x = noise(out, width, seed=seed), correlated(3 * width, width, seed=seed)
    keep, system = random_mask((out, width), share, seed), hessian(x, damp)
    best = least_squares(weight, system, keep)
    found = refit(weight, x, keep, damp).double()
    torch.testing.assert_close(found, best, rtol=0, atol=2e-3 * float(weight.abs().max()))
    assert error(found, weight, system) <= error(best, weight, system) * (1 + 1e-4) + 1e-6 * error(
        0 * best, weight, system
    )


@pytest.mark.parametrize("tokens", [3, 40, 500])
def test_wide_layers_with_few_or_many_tokens(tokens: int):
    weight, x = noise(6, 100, seed=1), correlated(tokens, 100, seed=2)
    keep, system = random_mask((6, 100), 0.4), hessian(x)
    best = error(least_squares(weight, system, keep), weight, system)
    assert error(refit(weight, x, keep), weight, system) <= 1.001 * best


def test_no_direction_on_the_mask_leads_further_down():
    weight, x, keep = noise(4, 30, seed=0), correlated(60, 30), random_mask((4, 30), 0.5)
    slope = (refit(weight, x, keep).double() - weight.double()) @ hessian(x)
    assert float(slope[keep].abs().max()) < 1e-4 * float((weight.double() @ hessian(x)).abs().max())


def test_the_start_does_not_matter():
    weight, x, keep = noise(4, 30, seed=0), correlated(60, 30), random_mask((4, 30), 0.5)
    first = refit(weight, x, keep)
    for start in (torch.zeros_like(weight), noise(4, 30, seed=5)):
        torch.testing.assert_close(refit(weight, x, keep, start=start), first, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_scale_of_the_inputs_does_not_matter(scale: float):
    weight, x, keep = noise(4, 30, seed=0), correlated(60, 30, dead=[4]), random_mask((4, 30), 0.5)
    torch.testing.assert_close(refit(weight, scale * x, keep), refit(weight, x, keep), rtol=1e-3, atol=1e-3)


def test_rows_that_keep_all_or_nothing():
    weight, x = noise(3, 12, seed=0), correlated(40, 12)
    keep = torch.tensor([True, False, True])[:, None].expand(3, 12).clone()
    keep[2, 5] = False
    found = refit(weight, x, keep)
    torch.testing.assert_close(found[0], weight[0])
    assert bool((found[1] == 0).all())
    assert not torch.allclose(found[2], weight[2] * keep[2])


def test_weights_of_dead_inputs_stay_as_they_are():
    weight, x, keep = noise(3, 12, seed=0), correlated(40, 12, dead=[2, 7]), random_mask((3, 12), 0.6)
    found = refit(weight, x, keep)
    torch.testing.assert_close(found[:, [2, 7]], (weight * keep)[:, [2, 7]])


def test_orthogonal_inputs_leave_nothing_to_make_up_for():
    weight, keep = noise(3, 8, seed=0), random_mask((3, 8), 0.5)
    torch.testing.assert_close(refit(weight, torch.eye(8) * 3, keep), weight * keep)
