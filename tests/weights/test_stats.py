"""Statistics are sums over tokens: the order and the portions in which tokens come do not matter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from problems import DAMP, correlated, hessian, noise, seen
from secateur.errors import SecateurError
from secateur.weights import stats as module
from secateur.weights.stats import Inputs, Stats


@given(
    groups=st.integers(1, 3),
    portions=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    width=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_portions_add_up(groups: int, portions: list[int], width: int, dtype: torch.dtype):
    x = noise(groups, sum(portions), width, seed=width).to(dtype)
    inputs = Inputs()
    for part in x.split(portions, dim=1):
        inputs.add(part, gram=True)
    inputs.complete()
    exact = x.double()
    assert inputs.tokens == sum(portions)
    torch.testing.assert_close(inputs.squares.double(), exact.square().sum(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs.gram.double(), exact.mT @ exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [7, 15, 16, 17, 24, 25, 40])
def test_stripes_of_a_wide_gram_matrix(width: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "STRIPE", 8)
    x = noise(2, 30, width, seed=0)
    inputs = Inputs()
    for part in x.split(10, dim=1):
        inputs.add(part, gram=True)
    inputs.complete()
    torch.testing.assert_close(inputs.gram, x.mT @ x)
    for start in range(0, width - 8, 8):  # beside the stripe's own square, which is summed whole
        assert torch.equal(
            inputs.gram[:, start : start + 8, start + 8 :], inputs.gram[:, start + 8 :, start : start + 8].mT
        )


def test_a_wide_gram_matrix_of_the_real_stripe():
    x = noise(3, 2 * module.STRIPE + 5, seed=0)
    torch.testing.assert_close(seen(x).gram[0], x.t() @ x, rtol=1e-4, atol=1e-4)


def test_without_a_gram_matrix_there_are_squares_alone():
    inputs = seen(noise(5, 3, seed=0), gram=False)
    assert inputs.gram is None
    for ask in (lambda: inputs.factor(DAMP), lambda: inputs.spectrum(0, DAMP)):
        with pytest.raises(SecateurError, match="no Gram matrix"):
            ask()


def test_an_input_is_dead_when_it_was_never_anything_but_zero():
    x = noise(2, 6, 4, seed=0)
    x[0, :, 1] = 0
    x[1, :-1, 2] = 0
    inputs = seen(x)
    assert inputs.dead(0).tolist() == [False, True, False, False]
    assert inputs.dead(1).tolist() == [False] * 4


def test_an_input_may_be_as_good_as_dead():
    """Too small for its inverse: it counts as dead wherever that is asked, so that it never looks like the others."""
    x = correlated(40, 6)
    x[:, 2] *= 1e-17
    inputs = seen(x)
    assert inputs.dead(0).tolist() == [j == 2 for j in range(6)]
    assert float(Stats(inputs, damp=DAMP).inverse_diagonal[2]) == torch.inf
    assert float(Stats(inputs, damp=DAMP).input_norm[2]) < 1e-15


def test_factors_and_spectra_are_kept_and_released():
    inputs = seen(correlated(20, 6))
    assert inputs.factor(DAMP) is inputs.factor(DAMP)
    assert inputs.spectrum(0, DAMP)[2] is inputs.spectrum(0, DAMP)[2]
    other = inputs.factor(0.1)
    assert not torch.equal(other, inputs.factor(DAMP))
    assert torch.equal(inputs.factor(0.1), other)
    inputs.release()
    assert inputs.gram is None
    assert inputs.squares is not None
    with pytest.raises(SecateurError):
        inputs.factor(DAMP)


def test_the_damping_that_was_needed_is_remembered():
    good, singular = seen(correlated(30, 6)), seen(noise(1, 6, seed=0))
    good.factor(DAMP)
    assert good.damping == DAMP
    singular.factor(1e-12)
    assert singular.damping > 1e-12
    most = singular.damping
    singular.spectrum(0, 1e-12)
    assert singular.damping >= most


def test_factors_of_groups_are_each_their_own():
    x = torch.stack([correlated(20, 5, seed=s) for s in (0, 10)])
    factors = seen(x).factor(DAMP)
    for group in range(2):
        assert torch.equal(factors[group], seen(x[group]).factor(DAMP)[0])


@pytest.mark.parametrize("groups", [1, 2])
def test_output_change(groups: int):
    """Exact when all tokens are kept, which few are."""
    calls = [noise(groups, module.SAMPLE_PER_CALL, 5, seed=s) for s in range(3)]
    inputs = Inputs()
    for call in calls:
        inputs.add(call, gram=False)
    before, after = noise(4, 5, seed=8), noise(4, 5, seed=9)
    change = size = 0.0
    for row in range(4):
        x = torch.cat(calls, 1)[row * groups // 4].double()
        change += float((x @ (after - before)[row].double()).square().sum())
        size += float((x @ before[row].double()).square().sum())
    assert inputs.output_change(before, after) == pytest.approx(change / size, rel=1e-4)
    assert inputs.output_change(before, before) == 0
    assert Inputs().output_change(before, after) is None


def test_few_tokens_are_kept_to_measure_on():
    inputs = Inputs()
    for seed in range(100):
        inputs.add(noise(1, 50, 3, seed=seed), gram=False)
    kept = sum(part.shape[1] for part in inputs.sample)
    assert module.SAMPLE <= kept < module.SAMPLE + module.SAMPLE_PER_CALL
    everything = torch.cat([noise(1, 50, 3, seed=seed) for seed in range(100)], 1)[0]
    assert {tuple(row) for row in torch.cat(inputs.sample, 1)[0].tolist()} <= {tuple(r) for r in everything.tolist()}


def test_per_input_statistics():
    x = correlated(40, 6, dead=[2])
    stats = Stats(seen(x), damp=DAMP)
    torch.testing.assert_close(stats.input_norm.double(), x.double().square().sum(0).sqrt(), rtol=1e-5, atol=0)
    expected = torch.linalg.inv(hessian(x)).diagonal().clone()
    expected[2] = torch.inf
    torch.testing.assert_close(stats.inverse_diagonal.double(), expected, rtol=1e-4, atol=0)
    scores = noise(5, 6, seed=0)
    torch.testing.assert_close(stats.column_sums(scores), scores.sum(0))


def test_per_input_statistics_of_groups_are_repeated_for_their_rows():
    x = torch.stack([correlated(40, 6, seed=s) for s in (0, 10)])
    stats, scores = Stats(seen(x), damp=DAMP, rows=6), noise(6, 6, seed=0)
    for name in ("input_norm", "inverse_diagonal"):
        found = getattr(stats, name)
        assert found.shape == (6, 6)
        for row in range(6):
            alone = getattr(Stats(seen(x[row // 3]), damp=DAMP), name)
            torch.testing.assert_close(found[row], alone)
    torch.testing.assert_close(stats.column_sums(scores)[4], scores[3:].sum(0))


def test_derivatives_are_means_over_samples():
    g, g2, h = noise(2, 3, seed=0), noise(2, 3, seed=1).square(), noise(2, 3, seed=2)
    stats = Stats(gradient=g, gradient_squares=g2, curvature_sum=h, samples=4)
    assert torch.equal(stats.mean_gradient, g / 4)
    assert torch.equal(stats.fisher, g2 / 4)
    assert torch.equal(stats.curvature, (h / 4).clamp(min=0))


@pytest.mark.parametrize("name", ["input_norm", "inverse_diagonal"])
def test_inputs_that_nobody_saw_are_an_error(name: str):
    with pytest.raises(SecateurError):
        getattr(Stats(), name)


@pytest.mark.parametrize("name", ["mean_gradient", "fisher", "curvature"])
def test_derivatives_that_nobody_took_are_an_error(name: str):
    with pytest.raises(SecateurError, match="needs gradients"):
        getattr(Stats(), name)
