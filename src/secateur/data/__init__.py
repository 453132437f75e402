"""Where calibration and evaluation inputs come from: text, saved tensors, or any iterable of batches.

It knows files and tokenizers, and nothing of models beyond the names of their forward's arguments.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.data.tensors import TENSOR_SUFFIXES, TOKEN_IDS, load_tensors
from secateur.data.text import bundled_text, load_text
from secateur.errors import SecateurError

Batch = Mapping[str, Tensor]  # keyword arguments of the model's forward; or INPUT alone or with TARGET
INPUT, TARGET = "*input", "*target"  # what a model takes by position, and its label: no argument can bear these names


class Tokenizer(Protocol):
    """Any tokenizer of transformers."""

    def encode(self, text: str, /, *, add_special_tokens: bool, verbose: bool) -> list[int]: ...


@dataclass(frozen=True)
class Data:
    """Batches in memory, in the order in which the model sees them.

    description: where they come from, for people. digest: sha256 of the contents, see `digest`.
    tokens: how many token ids `input_ids` hold over all batches (padding too); 0 for inputs without token ids.
    """

    batches: Sequence[Batch]
    description: str
    digest: str
    tokens: int


def calibration(
    source: str | Path | None,
    tokenizer: Tokenizer | None,
    *,
    samples: int,
    length: int,
    seed: int | None,
    field: str | None = None,
    encoder_decoder: bool = False,
    vocab_size: int | None = None,
) -> Data:
    """`samples` batches of one sample each, from a text file, JSON Lines, saved tensors, or the text we ship (None).

    Text gives {"input_ids": [1, length] int64}, with the same ids as "decoder_input_ids" for an encoder-decoder.
    Saved tensors (.safetensors and .npz keyed by forward argument, .npy = input_ids; first dimension = sample) keep
    their own length. The same seed takes the same samples; None takes evenly spaced ones. field: of JSON Lines.

    Raises SecateurError when the source cannot be read, is too small, or holds token ids outside 0..vocab_size - 1.
    """
    _at_least_one(samples=samples, length=length)
    path = None if source is None else Path(source)
    if path is not None and path.suffix.lower() in TENSOR_SUFFIXES:
        tensors = load_tensors(path)
        available = len(next(iter(tensors.values())))
        if available < samples:
            less = f", or ask for less: --samples {available}" if available else ""
            raise SecateurError(f"{path} holds {available} samples; {samples} are needed. Save more{less}.")
        chosen = _choose(available, samples, seed)
        batches = [{key: tensor[i : i + 1].clone() for key, tensor in tensors.items()} for i in chosen]
        description = f"{samples} of the {available} samples of {path.name}, {_how(seed)}"
    else:
        text, note = bundled_text() if path is None else load_text(path, field)
        if tokenizer is None:
            raise SecateurError(
                f"the model's folder has no tokenizer, and {note} is text. Give pre-tokenized tensors: .safetensors or "
                ".npz keyed by argument name, or .npy with the input_ids [samples, length]."
            )
        cut = _cut(text, tokenizer, length, samples, seed, note)
        batches = [{"input_ids": window[None]} for window in cut]
        description = f"{samples} windows of {length} tokens of {note}, {_how(seed)}"
    if encoder_decoder:
        batches = [_with_decoder_ids(batch) for batch in batches]
    return _data(batches, description, vocab_size)


def samples(asked: Any) -> int:
    """How many samples a recipe's `calibration` asks for; all that a file of tensors has, where it does not say."""
    if (
        asked.source is None
        or asked.source.suffix.lower() not in TENSOR_SUFFIXES
        or "samples" in asked.model_fields_set
    ):
        return asked.samples
    return len(next(iter(load_tensors(asked.source).values())))


def holdout(
    source: str | Path | None,
    tokenizer: Tokenizer,
    *,
    samples: int,
    length: int,
    count: int,
    seed: int | None = None,
    field: str | None = None,
) -> list[Tensor]:
    """Up to `count` windows of a text that `calibration` with the same seed does not take: [1, length] int64 each.

    Evenly spaced among the windows that are left; none when calibration takes them all.
    """
    text, _ = bundled_text() if source is None else load_text(Path(source), field)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    whole = len(ids) // length
    taken = set(_choose(whole, samples, seed)) if samples else set()
    free = [index for index in range(whole) if index not in taken]
    chosen = [free[place] for place in _choose(len(free), min(count, len(free)), None)]
    return [torch.tensor([ids[index * length : (index + 1) * length]]) for index in chosen]


def from_iterable(batches: Iterable[Any], vocab_size: int | None = None) -> Data:
    """All batches of anything that yields batches, such as a DataLoader; consumed once.

    A batch is a mapping of tensors (keyword arguments), a tensor, or a tuple or list (input, label, ...); the last two
    become {INPUT: input} and {INPUT: input, TARGET: label}, where a label that is no tensor is dropped. Tensors are
    detached and not copied.

    Raises SecateurError when there are none, an item is something else, a floating-point input has NaN or infinity, or
    a token id is outside 0..vocab_size - 1.
    """
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        found = f"a single {type(batches).__name__}"
        raise SecateurError(f"the data is {found}; an iterable of batches is expected. Wrap one batch in a list.")
    taken = [_as_batch(item, f"batch {index}") for index, item in enumerate(batches)]
    if not taken:
        raise SecateurError("the data yields no batches (a generator that was used up?); give at least one.")
    return _data(taken, f"{len(taken)} batches, the first {_shapes(taken[0])}", vocab_size)


def call(model: nn.Module, batch: Batch | Tensor | Sequence[Any], **options: Any) -> Any:
    """model(**batch) for a mapping; model(x) for a tensor x, for (x, label) and for what `from_iterable` made of them.

    options: further keyword arguments, such as use_cache=False. Raises SecateurError when the batch is something else.
    """
    batch = _as_batch(batch, "the batch")
    return model(batch[INPUT], **options) if INPUT in batch else model(**batch, **options)


def windows(text: str, tokenizer: Tokenizer, length: int, count: int, *, seed: int | None) -> Tensor:
    """`count` windows of `length` tokens, in the order of the text: [count, length] int64.

    The text is encoded as one string without special tokens and cut into k whole windows. seed None takes window
    (i * k) // count for i = 0..count - 1; otherwise a seeded sample without replacement.

    Raises SecateurError when k < count.
    """
    _at_least_one(length=length, count=count)
    return _cut(text, tokenizer, length, count, seed, "the text")


def digest(batches: Iterable[Batch]) -> str:
    """sha256, in hex, over the batches in order: of each its keys (sorted), dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for batch in batches:
        sha.update(f"batch of {len(batch)};".encode())
        for key, tensor in sorted(batch.items()):
            sha.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


# Choosing


def _cut(text: str, tokenizer: Tokenizer, length: int, count: int, seed: int | None, name: str) -> Tensor:
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    whole = len(ids) // length
    if whole < count:
        less = [f"--samples {whole}"] if whole else []
        less += [f"--length {len(ids) // count}"] if len(ids) >= count else []
        raise SecateurError(
            f"{name} has {len(ids):,} tokens, which make {whole} whole windows of {length}; {count} are needed. "
            f"Give more text{', or ask for less: ' if less else ''}{' or '.join(less)}."
        )
    return torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)[_choose(whole, count, seed)]


def _choose(available: int, count: int, seed: int | None) -> list[int]:
    if seed is None:
        return [(i * available) // count for i in range(count)]
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(available, generator=generator)[:count].tolist())


def _how(seed: int | None) -> str:
    return "evenly spaced" if seed is None else f"sampled with seed {seed}"


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise SecateurError(f"{name} is {number}; expected 1 or more.")


# Checking and describing


def _as_batch(item: Any, name: str) -> Batch:
    if isinstance(item, Tensor):
        return {INPUT: item.detach()}
    if isinstance(item, Mapping):
        wrong = next((key for key, value in item.items() if not isinstance(value, Tensor)), None)
        if wrong is not None or not item:
            found = f"{type(item[wrong]).__name__} under {wrong!r}" if item else "an empty mapping"
            raise SecateurError(f"{name} holds {found}; expected tensors by argument name (try torch.as_tensor).")
        return {str(key): value.detach() for key, value in item.items()}
    if isinstance(item, (tuple, list)) and len(item) > 0 and isinstance(item[0], Tensor):
        label = {TARGET: item[1].detach()} if len(item) > 1 and isinstance(item[1], Tensor) else {}
        return {INPUT: item[0].detach(), **label}
    found = f"a {type(item).__name__}"
    found += f" of {type(item[0]).__name__}" if isinstance(item, (tuple, list)) and item else ""
    raise SecateurError(f"{name} is {found}; expected a mapping of tensors, a tensor, or (input, label) of tensors.")


def _with_decoder_ids(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if "input_ids" not in batch or "decoder_input_ids" in batch:
        return batch
    return {**batch, "decoder_input_ids": batch["input_ids"]}


def _data(batches: Sequence[Batch], description: str, vocab_size: int | None = None) -> Data:
    for index, batch in enumerate(batches):
        for key, tensor in batch.items():
            if not _finite(key, tensor):
                raise SecateurError(
                    f"batch {index}: {key.removeprefix('*')} holds NaN or infinity; every value must be finite. "
                    "Check the preprocessing."
                )
            if vocab_size is not None and key in TOKEN_IDS:
                _check_vocabulary(tensor, vocab_size, f"batch {index}: {key}")
    tokens = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
    return Data(batches, description, digest(batches), tokens)


def _finite(key: str, tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wrong = tensor.isnan() if key.endswith("mask") else ~tensor.isfinite()  # additive masks hold -inf by design
    return not wrong.any()


def _check_vocabulary(ids: Tensor, vocab_size: int, name: str) -> None:
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise SecateurError(
            f"{name} holds token id {int(outside[0])}; the model's vocabulary has {vocab_size:,} ids, 0 to "
            f"{vocab_size - 1}. Use the tokenizer this model was trained with."
        )


def _shapes(batch: Batch) -> str:
    parts = (
        f"{key.removeprefix('*')} {list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for key, t in batch.items()
    )
    return ", ".join(parts)
