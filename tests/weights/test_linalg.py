"""Factorizations: equal to float64 inverses where there are any, and never without an answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from problems import DAMP, correlated, gram, hessian, noise
from secateur.errors import SecateurError
from secateur.weights.linalg import damped_, flip_, inverse_factor, invert_lower_, spectrum

WIDTHS = [1, 2, 3, 5, 16, 17, 64, 255, 256, 257, 300]


@pytest.mark.parametrize("dead", [(), (0,), (1, 2)])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_factor_is_that_of_the_inverse_to_rounding(width: int, dead: tuple[int, ...]):
    x = correlated(2 * width + 4, width, dead=[j for j in dead if j < width])
    factor, used = inverse_factor(gram(x), DAMP)
    assert used == DAMP
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor, torch.linalg.inv(hessian(x)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("width", WIDTHS)
def test_in_float32_it_is_as_near_as_float32_gets(width: int):
    x = correlated(2 * width + 4, width)
    factor, _ = inverse_factor(gram(x).float(), DAMP)
    inverse = torch.linalg.inv(hessian(x))
    found = factor.double().t() @ factor.double()
    assert float((found - inverse).norm() / inverse.norm()) < 1e-4


@pytest.mark.parametrize("width", [1, 2, 7, 256, 257, 600])
def test_the_gram_matrix_is_left_as_it_was(width: int):
    matrix = gram(correlated(9, width, dead=[0])).float()
    before = matrix.clone()
    inverse_factor(matrix, DAMP)
    spectrum(matrix, DAMP)
    assert torch.equal(matrix, before)


@given(st.integers(-12, 12), st.integers(0, 5), st.booleans())
def test_the_scale_of_the_inputs_does_not_matter(power: int, seed: int, dead: bool):
    """Powers of 4 round nothing; dead inputs, too, are measured by the others."""
    matrix = gram(correlated(20, 8, seed=seed, dead=[3] if dead else [])).float()
    scale = 4.0**power
    factor, used = inverse_factor(matrix.clone(), DAMP)
    scaled, again = inverse_factor(matrix * scale, DAMP)
    assert used == again
    assert torch.equal(scaled * 2.0**power, factor)


def degenerate(kind: str, width: int = 40) -> Tensor:
    x = noise(60, width, seed=3)
    match kind:
        case "nothing":
            x = x * 0
        case "one token":
            x = x[:1]
        case "constant":
            x = torch.ones_like(x)
        case "duplicates":
            x = x[:, :3].repeat(1, width)[:, :width]
        case "one live input":
            x[:, 1:] = 0
        case "one giant input":
            x[:, 7] *= 1e8
        case "one tiny input":
            x[:, 7] *= 1e-15
        case "all sizes":
            x = x * torch.logspace(-8, 8, width)
        case "tiny":
            x = x * 1e-15
        case "huge":
            x = x * 1e15
    return x.t() @ x


KINDS = [
    "nothing",
    "one token",
    "constant",
    "duplicates",
    "one live input",
    "one giant input",
    "one tiny input",
    "all sizes",
    "tiny",
    "huge",
]


@pytest.mark.parametrize("damp", [1e-12, 1e-6, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_no_finite_gram_matrix_is_without_a_factor(kind: str, damp: float):
    matrix = degenerate(kind)
    factor, used = inverse_factor(matrix.clone(), damp)
    assert bool(torch.isfinite(factor).all())
    assert bool((factor.diagonal() > 0).all())
    assert used >= damp
    # R H R' = I where H is well enough conditioned for float32 to tell
    if used >= 1e-3:
        system = damped_(matrix.double(), used)
        r = factor.double()
        torch.testing.assert_close(r @ system @ r.t(), torch.eye(len(r)).double(), rtol=0, atol=0.05)


@pytest.mark.parametrize("damp", [1e-12, 1e-6, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_no_finite_gram_matrix_is_without_a_spectrum(kind: str, damp: float):
    norm, values, vectors, used = spectrum(degenerate(kind), damp)
    assert all(bool(torch.isfinite(part).all()) for part in (norm, values, vectors))
    assert bool((norm > 0).all())
    assert bool((values > 0).all())
    assert used >= damp


@pytest.mark.parametrize("rank", [1, 2, 10, 39])
def test_damping_rises_no_further_than_it_has_to(rank: int):
    x = noise(rank, 40, seed=rank)
    _, used = inverse_factor(x.t() @ x, 1e-12)
    assert used <= 1e-4
    _, used = inverse_factor(x.t() @ x, DAMP)
    assert used == DAMP


@pytest.mark.parametrize("width", [1, 6, 40])
def test_the_spectrum_is_that_of_the_scaled_gram_matrix(width: int):
    x = correlated(3 * width, width, dead=[0] if width > 1 else [])
    norm, values, vectors, used = spectrum(gram(x).float(), DAMP)
    scale = gram(x).diagonal().sqrt()
    scale[scale == 0] = 1
    expected = gram(x) / scale / scale[:, None]
    expected.fill_diagonal_(1 + DAMP)
    assert used == DAMP
    torch.testing.assert_close(norm.double(), scale, rtol=1e-5, atol=0)
    found = (vectors.double() * values.double()) @ vectors.double().t()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(vectors @ vectors.t(), torch.eye(width), rtol=0, atol=1e-4)


@pytest.mark.parametrize("place", [(1, 1), (0, 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("function", [inverse_factor, spectrum])
def test_what_is_not_finite_is_an_error(function, value: float, place: tuple[int, int]):
    matrix = torch.eye(4)
    matrix[place] = matrix[place[::-1]] = value
    with pytest.raises(SecateurError, match="NaN or Inf"):
        function(matrix, DAMP)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 255, 256, 257, 511, 512, 513, 514, 700])
def test_flip(width: int):
    matrix = noise(width, width, seed=width)
    assert torch.equal(flip_(matrix.clone()), matrix.flip(0, 1))
    assert torch.equal(flip_(flip_(matrix.clone())), matrix)


@given(st.integers(1, 70), st.sampled_from([1, 2, 3, 8, 16, 31]))
def test_the_inverse_of_a_lower_triangle(width: int, leaf: int):
    lower = noise(width, width, seed=width).double().tril() / width**0.5
    lower.diagonal().abs_().add_(1)
    found = invert_lower_(lower.clone(), leaf)
    assert torch.equal(found, found.tril())
    torch.testing.assert_close(found, torch.linalg.inv(lower), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("width", [256, 257, 512, 513])
def test_the_inverse_around_the_size_of_a_leaf(width: int):
    lower = noise(width, width, seed=width).double().tril() / width + torch.eye(width).double()
    torch.testing.assert_close(invert_lower_(lower.clone()), torch.linalg.inv(lower), rtol=1e-9, atol=1e-12)
