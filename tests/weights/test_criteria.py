"""Every criterion against the same score in float64, written as loops; and what holds for all of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from secateur.weights.criteria import CRITERIA
from secateur.weights.stats import Inputs, Stats

OUT, WIDTH, TOKENS, SAMPLES = 5, 7, 40, 3


def make(seed: int = 0) -> tuple[Tensor, Tensor, Stats]:
    """Weights [OUT, WIDTH], tokens [TOKENS, WIDTH], and statistics as calibration collects them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, WIDTH, generator=generator)
    tokens = torch.randn(TOKENS, WIDTH, generator=generator) * torch.linspace(0.3, 2, WIDTH)
    inputs = Inputs()
    inputs.add(tokens[None], gram=True)
    inputs.complete()
    parts = [torch.randn(OUT, WIDTH, generator=generator) for _ in range(3)]
    stats = Stats(inputs, parts[0], parts[1].square(), parts[2], SAMPLES, seed=11)
    return weight, tokens.double(), stats


def norm(tokens: Tensor, j: int) -> float:
    return math.sqrt(sum(float(x) ** 2 for x in tokens[:, j]))


def inverse_diagonal(tokens: Tensor, damp: float) -> Tensor:
    hessian = tokens.t() @ tokens
    hessian = hessian + damp * hessian.diagonal().mean() * torch.eye(WIDTH, dtype=torch.float64)
    return torch.linalg.inv(hessian).diagonal()


def row_share(weight: Tensor, i: int, j: int) -> float:
    size = weight.double().abs()
    return float(size[i, j] / sum(size[k, j] for k in range(OUT)) + size[i, j] / sum(size[i, k] for k in range(WIDTH)))


ORACLES = {
    "magnitude": lambda w, x, s, i, j: abs(float(w[i, j])),
    "taylor": lambda w, x, s, i, j: abs(float(w[i, j]) * float(s.gradient[i, j]) / SAMPLES),
    "fisher": lambda w, x, s, i, j: float(w[i, j]) ** 2 * float(s.gradient_squares[i, j]) / SAMPLES / 2,
    "obd": lambda w, x, s, i, j: float(w[i, j]) ** 2 * max(0.0, float(s.curvature_sum[i, j]) / SAMPLES) / 2,
    "obs": lambda w, x, s, i, j: float(w[i, j]) ** 2 / float(inverse_diagonal(x, s.damp)[j]),
    "wanda": lambda w, x, s, i, j: abs(float(w[i, j])) * norm(x, j),
    "ria": lambda w, x, s, i, j: row_share(w, i, j) * math.sqrt(norm(x, j)),
}


@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_loops(name):
    weight, tokens, stats = make()
    expected = torch.tensor([[ORACLES[name](weight, tokens, stats, i, j) for j in range(WIDTH)] for i in range(OUT)])
    torch.testing.assert_close(CRITERIA[name].score(weight, stats), expected, rtol=2e-5, atol=1e-6)


def test_every_criterion_stands_in_the_table():
    assert set(CRITERIA) == {*ORACLES, "random"}


@pytest.mark.parametrize("name", CRITERIA)
def test_is_finite_and_of_the_weight_s_shape(name):
    weight, _, stats = make(1)
    score = CRITERIA[name].score(weight, stats)
    assert score.shape == weight.shape
    assert bool(torch.isfinite(score).all())
    assert bool((score >= 0).all())


@pytest.mark.parametrize("name", sorted(set(CRITERIA) - {"random"}))
def test_permuting_rows_permutes_scores(name):
    weight, _, stats = make(2)
    order = torch.randperm(OUT, generator=torch.Generator().manual_seed(3))
    turned = Stats(
        stats.inputs, stats.gradient[order], stats.gradient_squares[order], stats.curvature_sum[order], SAMPLES
    )
    score, permuted = CRITERIA[name].score(weight, stats), CRITERIA[name].score(weight[order], turned)
    torch.testing.assert_close(permuted, score[order], rtol=1e-6, atol=0)


def test_random_is_fixed_by_the_seed():
    weight, _, stats = make()
    one, two = CRITERIA["random"].score(weight, stats), CRITERIA["random"].score(weight, stats)
    other = CRITERIA["random"].score(weight, Stats(seed=12))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_grouped_inputs_score_each_group_with_its_own():
    weight, _, _ = make()
    weight = weight[:4]
    inputs = Inputs()
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(5))
    inputs.add(x, gram=True)
    inputs.complete()
    score = CRITERIA["wanda"].score(weight, Stats(inputs, rows=4))
    for group in range(2):
        rows = slice(2 * group, 2 * group + 2)
        expected = weight[rows].abs() * x[group].norm(dim=0)
        torch.testing.assert_close(score[rows], expected)
