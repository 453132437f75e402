import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from secateur.errors import SecateurError
from secateur.measure import quality
from secateur.measure.quality import Estimate, Quality, compare, evaluate, log_ratio, token_losses

VOCABULARY = 23


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def random_ids(windows: int = 5, length: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """A language model that always gives the same logits, and keeps what it was called with."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.logits = torch.as_tensor(logits)
        self.calls: list[dict[str, Any]] = []

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        self.calls.append({"shape": list(input_ids.shape), "grad": torch.is_grad_enabled(), **options})
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def slow_log_probabilities(model: nn.Module, ids: Tensor) -> np.ndarray:
    """[n, length - 1, vocabulary] float64: one forward per prefix, the softmax by hand. No position can see ahead."""
    model.eval()
    rows = []
    for window in ids:
        for end in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=window[None, :end]).logits[0, -1].double().numpy()
            rows.append(logits - logits.max() - math.log(sum(math.exp(x - logits.max()) for x in logits)))
    return np.stack(rows).reshape(len(ids), ids.shape[1] - 1, -1)


# Losses and perplexity


def test_token_losses_are_those_of_one_forward_per_prefix() -> None:
    model, ids = llama(), random_ids()
    log_p = slow_log_probabilities(model, ids)
    expected = [[-log_p[i, t, ids[i, t + 1]] for t in range(6)] for i in range(5)]
    losses = token_losses(model, ids)
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.numpy(), expected, atol=2e-6)
    made = evaluate(model, ids)
    assert made.perplexity == pytest.approx(math.exp(np.mean(expected)), rel=1e-6)
    assert made.nll_per_window == pytest.approx(np.mean(expected, axis=1), abs=2e-6)
    assert made.tokens == 30


def test_perplexity_is_that_of_transformers_own_loss() -> None:
    model, ids = llama().eval(), random_ids()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert evaluate(model, ids).nll == pytest.approx(loss, abs=1e-6)


@given(st.integers(2, 50), st.floats(-30, 30), st.integers(1, 4), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_the_perplexity_of_a_uniform_model_is_its_vocabulary(size: int, level: float, n: int, length: int) -> None:
    ids = torch.arange(n * length).view(n, length) % size
    assert evaluate(Fixed([level] * size), ids).perplexity == pytest.approx(size, rel=1e-5)


def test_a_llama_with_a_zero_head_is_uniform() -> None:
    model = llama()
    nn.init.zeros_(model.lm_head.weight)
    assert evaluate(model, random_ids()).perplexity == pytest.approx(VOCABULARY, rel=1e-6)


def test_one_window_at_a_time_in_eval_mode_without_gradients_or_cache() -> None:
    model, ticks = Fixed([0.0] * VOCABULARY), []
    token_losses(model, random_ids(3), progress=lambda done, total: ticks.append((done, total)))
    assert model.calls == [{"shape": [1, 7], "grad": False, "use_cache": False}] * 3
    assert ticks == [(1, 3), (2, 3), (3, 3)]


def test_modes_are_put_back_and_dropout_is_off() -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=1, n_head=1, resid_pdrop=0.9)
    model = GPT2LMHeadModel(config).train()
    next(module for name, module in model.named_modules() if name.endswith("mlp")).eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(token_losses(model, random_ids()), token_losses(model, random_ids()))
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(SecateurError, match=r"window 0, of 9 tokens.*no positions beyond 8; use shorter windows"):
        token_losses(model, random_ids(length=9))
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_logits_are_taken_in_float32(dtype: torch.dtype) -> None:
    logits = torch.linspace(-3, 5, VOCABULARY).to(dtype)
    expected = -logits.double().log_softmax(-1)
    losses = token_losses(Fixed(logits), torch.arange(VOCABULARY)[None])
    np.testing.assert_allclose(losses[0], expected[1:], rtol=1e-6)


def test_short_chunks_of_positions_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    models, ids = (llama(0), llama(1)), random_ids()
    whole = token_losses(models[0], ids), compare(*models, ids, resamples=20)
    monkeypatch.setattr(quality, "CHUNK", 2 * VOCABULARY)
    assert torch.equal(token_losses(models[0], ids), whole[0])
    assert compare(*models, ids, resamples=20) == whole[1]


def test_an_infinite_perplexity_is_valid_json() -> None:
    made = evaluate(Fixed([0.0, 2000.0]), torch.zeros(1, 3, dtype=torch.long))
    assert made.perplexity == math.inf
    assert made.nll == 2000.0
    assert json.loads(json.dumps(made.as_dict(), allow_nan=False))["perplexity"] is None


# Comparison


def test_comparison_against_float64_by_hand() -> None:
    dense, pruned, ids = llama(0), llama(1), random_ids()
    p, q = slow_log_probabilities(dense, ids), slow_log_probabilities(pruned, ids)
    kl = np.array([[sum(math.exp(a) * (a - b) for a, b in zip(*r, strict=True)) for r in zip(*w, strict=True)]
                   for w in zip(p, q, strict=True)])  # fmt: skip
    same = (p.argmax(-1) == q.argmax(-1)).astype(float)
    made = compare(dense, pruned, ids, resamples=100)
    assert made.kl_mean.value == pytest.approx(kl.mean(), abs=1e-5)
    assert made.kl_p99.value == pytest.approx(np.quantile(kl, 0.99, method="inverted_cdf"), abs=1e-5)
    assert made.agreement.value == pytest.approx(same.mean(), abs=1e-12)
    assert 0 < same.mean() < 1
    assert made.kl_per_window == pytest.approx(kl.mean(1), abs=1e-5)
    assert made.agreement_per_window == pytest.approx(same.mean(1), abs=1e-12)
    assert made.dense == evaluate(dense, ids)
    assert made.pruned == evaluate(pruned, ids)
    assert made.log_ratio.value == pytest.approx(math.log(made.pruned.perplexity / made.dense.perplexity), abs=1e-12)
    assert made.log_ratio == log_ratio(made.dense, made.pruned, resamples=100)


logit_rows = st.lists(st.floats(-8, 8, width=32, allow_subnormal=False), min_size=4, max_size=4)


@given(logit_rows, logit_rows)
@settings(max_examples=50, deadline=None)
def test_comparison_of_two_constant_distributions_has_a_closed_form(a: list[float], b: list[float]) -> None:
    p, q = (np.exp(x) / np.exp(x).sum() for x in (np.array(a), np.array(b)))
    made = compare(Fixed(a), Fixed(b), torch.full((3, 5), 2), resamples=50)
    kl = float((p * np.log(p / q)).sum())
    assert made.kl_mean.value == pytest.approx(kl, abs=1e-5, rel=1e-5)
    assert made.kl_p99.value == pytest.approx(kl, abs=1e-5, rel=1e-5)
    assert made.log_ratio.value == pytest.approx(math.log(p[2] / q[2]), abs=1e-5)
    assert made.agreement.value == float(np.argmax(a) == np.argmax(b))
    for estimate in (made.kl_mean, made.kl_p99, made.log_ratio, made.agreement):
        assert estimate.low == estimate.value == estimate.high  # the same in every window: no uncertainty at all


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_compared_in_float32(dtype: torch.dtype) -> None:
    left, right = torch.linspace(-3, 5, VOCABULARY).to(dtype), torch.linspace(2, -1, VOCABULARY).to(dtype)
    log_p, log_q = left.double().log_softmax(-1), right.double().log_softmax(-1)
    made = compare(Fixed(left), Fixed(right), torch.full((2, 3), 4), resamples=10)
    assert made.kl_mean.value == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum()), rel=1e-5)
    assert made.log_ratio.value == pytest.approx(float(log_p[4] - log_q[4]), rel=1e-5)


def test_agreement_is_that_of_the_logits_even_where_the_softmax_rounds_them_to_a_tie() -> None:
    made = compare(Fixed([0.0, 0.0, 0.0]), Fixed([0.0, 1e-20, 0.0]), torch.zeros(2, 2, dtype=torch.long))
    assert made.agreement.value == 0.0


def test_a_model_compared_with_itself() -> None:
    model = llama()
    made = compare(model, model, random_ids())
    nothing = Estimate(0.0, 0.0, 0.0)
    assert (made.log_ratio, made.kl_mean, made.kl_p99) == (nothing, nothing, nothing)
    assert made.agreement == Estimate(1.0, 1.0, 1.0)


def test_comparison_is_json_and_repeats_by_seed() -> None:
    models, ids, ticks = (llama(0), llama(1)), random_ids(), []
    made = compare(*models, ids, seed=3, progress=lambda done, total: ticks.append((done, total)))
    assert ticks == [(i, 5) for i in range(1, 6)]
    assert made == compare(*models, ids, seed=3)
    few = [compare(*models, ids, seed=seed, resamples=9).log_ratio for seed in range(4)]
    assert len(set(few)) > 1  # with thousands of resamples of 5 windows, seeds agree
    stored = json.loads(json.dumps(made.as_dict(), allow_nan=False))
    assert stored == made.as_dict()
    assert (stored["seed"], stored["resamples"], stored["confidence"]) == (3, 10_000, 0.95)
    assert len(stored["kl_per_window"]) == len(stored["dense"]["nll_per_window"]) == 5


def test_the_digest_tells_windows_apart_whatever_their_integers() -> None:
    model, ids = Fixed([0.0] * VOCABULARY), random_ids()
    assert evaluate(model, ids).digest == evaluate(model, ids.int()).digest
    assert evaluate(model, ids).digest != evaluate(model, ids.flip(0)).digest


# Intervals

columns = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


def made_of(values: list[float]) -> Quality:
    return Quality(1.0, float(np.mean(values)), tuple(values), len(values), "same")


@given(columns, st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_an_interval_holds_its_estimate_and_stays_within_the_data(values: list[float], seed: int) -> None:
    found = log_ratio(made_of([0.0] * len(values)), made_of(values), seed=seed, resamples=1000)
    assert found.value == pytest.approx(np.mean(values), abs=1e-9)
    assert found.low <= found.value + 1e-9
    assert found.high >= found.value - 1e-9
    assert found.low >= min(values) - 1e-9
    assert found.high <= max(values) + 1e-9


@given(columns, st.integers(-8, 8))
@settings(max_examples=50, deadline=None)
def test_pairing_removes_what_the_windows_share(values: list[float], step: int) -> None:
    dense = [float(round(value)) for value in values]  # integers: their differences are exact
    found = log_ratio(made_of(dense), made_of([value + step for value in dense]), resamples=100)
    assert found == Estimate(step, step, step)


def test_an_interval_of_normal_data_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = log_ratio(made_of([0.0] * 400), made_of(values.tolist()))
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_every_resample_draws_as_many_windows_as_there_are() -> None:
    counts = quality._draw(7, 2000, seed=0)
    assert (counts.sum(1) == 7).all()
    assert (counts == counts.round()).all()
    np.testing.assert_allclose(counts.mean(0), 1, atol=0.1)
    np.testing.assert_allclose(counts.var(0), 7 * (1 / 7) * (6 / 7), atol=0.1)  # binomial


@given(st.integers(2, 6), st.integers(1, 60), st.integers(1, 30), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_percentile_of_a_resample_is_that_of_its_tokens_laid_out(
    n: int, length: int, values: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(values, (n, length), generator=generator).float()  # with many ties
    counts = quality._draw(n, 20, seed)
    laid_out = [np.repeat(tokens.numpy(), row.int().numpy(), axis=0) for row in counts]
    expected = [sorted(tokens.flatten())[math.ceil(99 * tokens.size / 100) - 1] for tokens in laid_out]
    assert quality._weighted_percentile(tokens, counts).tolist() == expected


def test_the_percentiles_interval_is_that_of_the_resamples() -> None:
    tokens = torch.rand(30, 50, generator=torch.Generator().manual_seed(0)).square()
    counts = quality._draw(30, 2500, seed=1)  # more than one block
    found = quality._percentile(tokens, counts)
    each = [np.quantile(np.repeat(tokens.numpy(), row.int().numpy(), axis=0), 0.99, method="inverted_cdf")
            for row in counts]  # fmt: skip
    assert [found.low, found.high] == pytest.approx(np.quantile(each, [0.025, 0.975]), abs=1e-9)
    assert found.low < found.value < found.high


# Errors


class Breaks(Fixed):
    """Gives a bad logit where the input holds token 3."""

    def __init__(self, bad: float) -> None:
        super().__init__([0.0] * VOCABULARY)
        self.bad = bad

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        logits = self.logits.repeat(*input_ids.shape, 1)
        logits[..., 0][input_ids == 3] = self.bad
        return SimpleNamespace(logits=logits)


class Encoder(Fixed):
    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return SimpleNamespace(last_hidden_state=input_ids)


class Classifier(Fixed):
    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        return (self.logits[None],)


UNIFORM = Fixed([0.0] * VOCABULARY)
IDS = torch.tensor([[1, 2], [2, 1], [1, 3]])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: evaluate(Breaks(math.nan), IDS), "the model's logits hold NaN or infinity in window 2"),
        (lambda: evaluate(Breaks(math.inf), IDS), "window 2"),
        (lambda: compare(UNIFORM, Breaks(-math.inf), IDS), "the pruned's logits.*window 2"),
        (lambda: compare(Breaks(math.nan), UNIFORM, IDS), "the dense's logits.*window 2"),
        (lambda: evaluate(UNIFORM, IDS.float()), r"float32 \[3, 2\]; expected integers"),
        (lambda: evaluate(UNIFORM, IDS[0]), r"int64 \[2\]; expected integers \[windows, length\]"),
        (lambda: evaluate(UNIFORM, IDS[:0]), "at least one window"),
        (lambda: evaluate(UNIFORM, IDS[:, :1]), "needs 2 tokens or more"),
        (lambda: evaluate(llama(), IDS + VOCABULARY), "token id 26 is outside the model's vocabulary of 23 ids"),
        (lambda: evaluate(llama(), IDS - 2), "token id -1 is outside"),
        (lambda: evaluate(Encoder([0.0]), IDS), "a SimpleNamespace without logits.*causal language model"),
        (lambda: evaluate(Classifier([0.0]), IDS), r"gave logits \[1, 1\]; expected \[1, 2, vocabulary\]"),
        (lambda: compare(UNIFORM, Fixed([0.0] * 9), IDS), "dense model has 23 logits and the pruned one 9"),
        (lambda: compare(UNIFORM, UNIFORM, IDS[:1]), "needs 2 windows and 1 resample or more; found 1 and 10000"),
        (lambda: compare(UNIFORM, UNIFORM, IDS, resamples=0), "found 3 and 0"),
        (lambda: log_ratio(evaluate(UNIFORM, IDS), evaluate(UNIFORM, IDS[:2])), "different token ids.*same windows"),
    ],
)
def test_errors(run: Callable[[], Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        run()
