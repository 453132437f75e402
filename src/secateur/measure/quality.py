"""What a language model lost: perplexity, and its next-token distributions compared with the dense model's.

Everything is per window of token ids, so that two models are compared on the same windows (paired) and intervals come
from resampling whole windows: tokens of one window are not independent. Logits live for one window at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import digest
from secateur.errors import SecateurError

Progress = Callable[[int, int], None]  # (windows done, windows in all)

CONFIDENCE = 0.95
TAIL = 99  # the percentile of the KL divergence
CHUNK = 1 << 24  # most logits that are held in float32 at a time


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Quality:
    """One model on one set of windows.

    perplexity: exp of `nll`, the mean next-token loss in nats over all windows (infinity where a float has no room).
    nll_per_window: mean loss of each window. tokens: losses in all. digest: of the ids; equal = can be paired.
    """

    perplexity: float
    nll: float
    nll_per_window: tuple[float, ...]
    tokens: int
    digest: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON; an infinite perplexity becomes None."""
        return {
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "nll": self.nll,
            "nll_per_window": list(self.nll_per_window),
            "tokens": self.tokens,
            "digest": self.digest,
        }


@dataclass(frozen=True)
class Comparison:
    """A pruned model beside the dense one on the same windows.

    log_ratio: log(perplexity pruned / dense), nats per token; above 0 = worse. kl_mean, kl_p99: KL(dense || pruned) per
    token in nats, its mean and 99th percentile. agreement: share of positions where both put the same token first.
    """

    dense: Quality
    pruned: Quality
    log_ratio: Estimate
    kl_mean: Estimate
    kl_p99: Estimate
    agreement: Estimate
    kl_per_window: tuple[float, ...]
    agreement_per_window: tuple[float, ...]
    resamples: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON; everything per window too, so that runs can be paired later without the models."""
        return {
            "dense": self.dense.as_dict(),
            "pruned": self.pruned.as_dict(),
            "log_ratio": self.log_ratio.as_dict(),
            "kl_mean": self.kl_mean.as_dict(),
            "kl_p99": self.kl_p99.as_dict(),
            "agreement": self.agreement.as_dict(),
            "kl_per_window": list(self.kl_per_window),
            "agreement_per_window": list(self.agreement_per_window),
            "confidence": CONFIDENCE,
            "resamples": self.resamples,
            "seed": self.seed,
        }


def evaluate(model: nn.Module, ids: Tensor, *, progress: Progress | None = None) -> Quality:
    """Perplexity of a causal language model on ids [n, length]; progress(windows done, n) is called after each window.

    Raises SecateurError as `token_losses` does.
    """
    return _quality(token_losses(model, ids, progress=progress), ids)


def token_losses(model: nn.Module, ids: Tensor, *, progress: Progress | None = None) -> Tensor:
    """Cross-entropy in nats of tokens 1..length - 1 of each window given those before: [n, length - 1] float32 on CPU.

    ids: [n, length] integers, length at least 2. The model may be any causal one of transformers in any dtype and mode
    (it is evaluated in eval mode and put back): losses are computed in float32 from its logits, a window at a time.

    Raises SecateurError when ids do not fit the model, or logits are NaN or infinite (naming the window).
    """
    _check_ids(ids, model)
    losses = []
    with _evaluating(model):
        for index, window in enumerate(ids):
            losses.append(_window_losses(_logits(model, window, index), window[1:]))
            if progress is not None:
                progress(index + 1, len(ids))
    return torch.stack(losses)


def compare(
    dense: nn.Module,
    pruned: nn.Module,
    ids: Tensor,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    progress: Progress | None = None,
) -> Comparison:
    """Both models on ids [n, length], n at least 2, window by window; both must be in memory.

    KL and agreement are taken at the length - 1 positions whose next token is known. Intervals: percentile bootstrap
    over windows, drawn with `seed`, one set of draws for all of them.

    Raises SecateurError as `token_losses` does, when the vocabularies differ in size, and when n < 2.
    """
    for model in (dense, pruned):
        _check_ids(ids, model)
    counts = _draw(len(ids), resamples, seed)
    contrasts = []
    with _evaluating(dense, pruned):
        for index, window in enumerate(ids):
            left, right = _logits(dense, window, index, "dense"), _logits(pruned, window, index, "pruned")
            contrasts.append(_window_contrast(left, right, window[1:]))
            if progress is not None:
                progress(index + 1, len(ids))
    dense_loss, pruned_loss, kl, same = torch.stack(contrasts, dim=1)  # [n, length - 1] each
    kl_per_window, same_per_window = kl.double().mean(1), same.double().mean(1)
    qualities = _quality(dense_loss, ids), _quality(pruned_loss, ids)
    return Comparison(
        *qualities,
        log_ratio=_mean(_differences(*qualities), counts),
        kl_mean=_mean(kl_per_window, counts),
        kl_p99=_percentile(kl, counts),
        agreement=_mean(same_per_window, counts),
        kl_per_window=tuple(kl_per_window.tolist()),
        agreement_per_window=tuple(same_per_window.tolist()),
        resamples=resamples,
        seed=seed,
    )


def log_ratio(dense: Quality, pruned: Quality, *, seed: int = 0, resamples: int = 10_000) -> Estimate:
    """log(perplexity of pruned / dense) from two evaluations made apart, with the interval that `compare` gives.

    Raises SecateurError when they are not of the same windows, or of fewer than 2.
    """
    if dense.digest != pruned.digest:
        raise SecateurError(
            f"the two evaluations are of different token ids ({dense.digest[:8]}, {pruned.digest[:8]}) and cannot be "
            "paired; evaluate both models on the same windows."
        )
    return _mean(_differences(dense, pruned), _draw(len(dense.nll_per_window), resamples, seed))


# One window


def _logits(model: nn.Module, window: Tensor, index: int, name: str = "model") -> Tensor:
    """Logits that predict tokens 1..length - 1 of a window [length]: [length - 1, vocabulary], finite."""
    at = next((parameter.device for parameter in model.parameters()), window.device)
    try:
        output = model(input_ids=window[None].to(at), use_cache=False)
    except IndexError as error:
        raise SecateurError(
            f"the {name} fails on window {index}, of {len(window)} tokens: {error}. It may have no positions beyond "
            f"{_config(model, 'max_position_embeddings')}; use shorter windows (--length)."
        ) from error
    logits: Any = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)
    shape = list(getattr(logits, "shape", []))
    if shape[:-1] != [1, len(window)] or len(shape) != 3:
        found = f"logits {shape}" if shape else f"a {type(output).__name__} without logits"
        expected = f"[1, {len(window)}, vocabulary]"
        raise SecateurError(f"the {name} gave {found}; expected {expected}. Load it as a causal language model.")
    if not logits.isfinite().all():
        raise SecateurError(
            f"the {name}'s logits hold NaN or infinity in window {index} (counted from 0). Check its weights, or "
            "compute in bfloat16 or float32 instead of float16."
        )
    return logits[0, :-1]


def _window_losses(logits: Tensor, target: Tensor) -> Tensor:
    """logits [tokens, vocabulary], target [tokens] -> losses [tokens] float32, on CPU."""
    rows = _rows(logits)
    target = target.long().to(logits.device)
    parts = [_losses(x.float().log_softmax(-1), y) for x, y in zip(logits.split(rows), target.split(rows), strict=True)]
    return torch.cat(parts).cpu()


def _window_contrast(dense: Tensor, pruned: Tensor, target: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] of both -> [4, tokens] float32, on CPU.

    The four are dense loss, pruned loss, KL(dense || pruned), and 1 where both put the same token first.
    """
    if dense.shape != pruned.shape:
        raise SecateurError(
            f"the dense model has {dense.shape[1]} logits and the pruned one {pruned.shape[1]}; their vocabularies "
            "must be the same. Compare models of one tokenizer."
        )
    rows = _rows(dense)
    target = target.long().to(dense.device)
    parts = []
    for left, right, y in zip(dense.split(rows), pruned.split(rows), target.split(rows), strict=True):
        log_p, log_q = left.float().log_softmax(-1), right.float().to(left.device).log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # [rows]; below 0 only by rounding
        same = left.argmax(-1) == right.argmax(-1).to(left.device)  # of logits: softmax may round two to a tie
        parts.append(torch.stack([_losses(log_p, y), _losses(log_q, y), kl, same.float()]))
    return torch.cat(parts, dim=1).cpu()


def _losses(log_p: Tensor, target: Tensor) -> Tensor:
    return -log_p.gather(-1, target[:, None])[:, 0]  # [rows, vocabulary], [rows] -> [rows]


def _rows(logits: Tensor) -> int:
    return max(1, CHUNK // logits.shape[-1])


def _quality(losses: Tensor, ids: Tensor) -> Quality:
    per_window = losses.double().mean(1)
    nll = per_window.mean().item()
    perplexity = math.exp(nll) if nll < 700 else math.inf
    name = digest([{"input_ids": ids.long()}])
    return Quality(perplexity, nll, tuple(per_window.tolist()), losses.numel(), name)


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    training = [module for model in models for module in model.modules() if module.training]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _check_ids(ids: Tensor, model: nn.Module) -> None:
    kind = f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
    if ids.ndim != 2 or len(ids) == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise SecateurError(f"the token ids are {kind}; expected integers [windows, length], at least one window.")
    if ids.shape[1] < 2:
        raise SecateurError(f"the token ids are {kind}; a window needs 2 tokens or more, so that one is predicted.")
    low, high, vocabulary = int(ids.min()), int(ids.max()), _config(model, "vocab_size")
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise SecateurError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of {vocabulary} ids. Use the "
            "tokenizer this model was trained with."
        )


def _config(model: nn.Module, name: str) -> int | None:
    """A number in the configuration of the language part; None where there is none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    number = getattr(text, name, None)
    return number if isinstance(number, int) else None


# Resampling windows


def _draw(windows: int, resamples: int, seed: int) -> Tensor:
    """How often each resample holds each window: [resamples, windows] float64, rows sum to `windows`."""
    if windows < 2 or resamples < 1:
        raise SecateurError(
            f"an interval needs 2 windows and 1 resample or more; found {windows} and {resamples}. Use more windows, "
            "or `evaluate` for the perplexity alone."
        )
    draws = torch.randint(windows, (resamples, windows), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, windows, dtype=torch.float64)
    return counts.scatter_add_(1, draws, torch.ones((), dtype=torch.float64).expand_as(draws))


def _differences(dense: Quality, pruned: Quality) -> Tensor:
    """Loss per window, pruned less dense: [n] float64."""
    pairs = zip(dense.nll_per_window, pruned.nll_per_window, strict=True)
    return torch.tensor([after - before for before, after in pairs], dtype=torch.float64)


def _mean(per_window: Tensor, counts: Tensor) -> Estimate:
    """Mean over windows [n] float64; taken relative to the first, so that equal windows give exactly their value."""
    shift = per_window - per_window[0]
    return _estimate(per_window[0] + shift.mean(), per_window[0] + counts @ shift / len(shift))


def _percentile(tokens: Tensor, counts: Tensor) -> Estimate:
    """The TAIL-th percentile over all tokens [n, tokens]: the smallest value that TAIL % of them do not exceed."""
    once = torch.ones(1, counts.shape[1], dtype=counts.dtype)
    resampled = [_weighted_percentile(tokens, block) for block in counts.split(1000)]
    return _estimate(_weighted_percentile(tokens, once)[0], torch.cat(resampled))


def _weighted_percentile(tokens: Tensor, counts: Tensor) -> Tensor:
    """tokens [n, length], counts [resamples, n] -> [resamples]; exact, and without the resamples' tokens in memory.

    All values are sorted once. The run of sorted values where a resample's count crosses TAIL % is found first, then
    the place in that run.
    """
    values, order = tokens.double().flatten().sort()
    window = order // tokens.shape[1]
    need = -(-TAIL * len(values) // 100)  # rounded up
    run = math.isqrt(len(values)) + 1
    place = torch.arange(len(values))
    per_run = torch.zeros(-(-len(values) // run), len(tokens), dtype=counts.dtype)
    per_run.index_put_((place // run, window), torch.ones((), dtype=counts.dtype), accumulate=True)
    held = counts @ per_run.mT  # [resamples, runs]
    upto = held.cumsum(1)
    crossed = (upto < need).sum(1, keepdim=True)  # [resamples, 1]
    before = (upto - held).gather(1, crossed)
    places = (crossed * run + torch.arange(run)).clamp(max=len(values) - 1)  # [resamples, run]
    inside = before + counts.gather(1, window[places]).cumsum(1)
    return values[(crossed * run + (inside < need).sum(1, keepdim=True))[:, 0]]


def _estimate(value: Tensor, resampled: Tensor) -> Estimate:
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=resampled.dtype)
    low, high = resampled.quantile(ends).tolist()
    return Estimate(value.item(), low, high)
