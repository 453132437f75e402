"""Probes: seeded inputs, and what the model answers. Kept beside the weights, so that a reload can be checked anywhere."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import Batch

TOKENS, DECODER_TOKENS = 16, 8
KEPT = 16  # output values written down
TOLERANCE = 1e-3  # of the largest output, for computing on another machine or with another kernel
MODALITIES = ("input_ids", "pixel_values", "input_features", "input_values")  # names of main inputs


def probe_batches(model: nn.Module, seed: int) -> list[Batch]:
    """Guesses at an input of the right shape, from the model's config and the arguments of its forward: its main input,
    then that with each other kind that it names, then all of them. Not every one need run; none where it names no kind
    that is known here.
    """
    taken = [name for name in MODALITIES if name in inspect.signature(model.forward).parameters]
    main = getattr(model, "main_input_name", None)
    firsts = [main] if main in MODALITIES else taken
    guesses = [[first] for first in firsts]
    guesses += [[first, other] for first in firsts for other in taken if other != first]
    guesses += [[*firsts, *(name for name in taken if name not in firsts)]]
    distinct = [names for index, names in enumerate(guesses) if names and set(names) not in map(set, guesses[:index])]
    return [_batch(model, names, seed) for names in distinct]


def _batch(model: nn.Module, names: Sequence[str], seed: int) -> Batch:
    config = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(seed)
    batch: dict[str, Tensor] = {}
    for name in names:
        if name == "input_ids":
            batch[name] = _ids(model, TOKENS, generator)
        elif name == "pixel_values":
            size = _first(config, "image_size", 224)
            height, width = size if isinstance(size, (list, tuple)) else (size, size)
            batch[name] = torch.randn(1, _first(config, "num_channels", 3), height, width, generator=generator)
        elif name == "input_features":
            frames = 2 * _first(config, "max_source_positions", 1500)
            batch[name] = torch.randn(1, _first(config, "num_mel_bins", 80), frames, generator=generator)
        else:
            frames, bins = _first(config, "max_length", None), _first(config, "num_mel_bins", None)
            shape = (1, frames, bins) if frames and bins else (1, 16000)  # a spectrogram, or a second of sound
            batch[name] = torch.randn(*shape, generator=generator)
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = _ids(model, DECODER_TOKENS, generator)
    return batch


def _ids(model: nn.Module, length: int, generator: torch.Generator) -> Tensor:
    """Token ids that stand for nothing but text."""
    config = getattr(model, "config", None)
    special = {value for key, value in _fields(config) if key.endswith(("token_id", "token_index")) and value}
    size = vocabulary(model) or _first(config, "vocab_size", 1000)
    plain = [index for index in range(min(size, 30000)) if index not in special and index > 2] or [0]
    return torch.tensor(plain)[torch.randint(len(plain), (1, length), generator=generator)]


def vocabulary(model: nn.Module) -> int | None:
    """How many token ids the model has an embedding for, where it has one."""
    find = getattr(model, "get_input_embeddings", None)
    try:
        table = find() if find is not None else None
    except (NotImplementedError, AttributeError):
        return None
    return getattr(table, "num_embeddings", None)


def _parts(config: Any) -> Iterator[Any]:
    """A config and the configs in it, outermost first."""
    yield config
    for value in vars(config).values() if hasattr(config, "__dict__") else ():
        if hasattr(value, "model_type") and hasattr(value, "to_dict"):
            yield from _parts(value)


def _fields(config: Any) -> Iterator[tuple[str, int]]:
    for part in _parts(config):
        yield from ((key, value) for key, value in vars(part).items() if type(value) is int)


def _first(config: Any, name: str, default: Any) -> Any:
    """A field of the config or of one of its parts."""
    return next((found for part in _parts(config) if (found := getattr(part, name, None)) is not None), default)


def answer(output: Any) -> Tensor:
    """The tensor of a model's output that counts: logits, the last hidden state, or the first tensor there is."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    found = next(_tensors(output), None)
    if found is None:
        raise TypeError(f"the model's output, a {type(output).__name__}, has no tensor in it")
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, (list, tuple)):
        yield from (tensor for value in output for tensor in _tensors(value))


def digest(values: Tensor) -> dict[str, Any]:
    """What to write down of an answer: its shape, its size, and KEPT values spread over it."""
    flat = values.detach().float().flatten()
    places = torch.linspace(0, len(flat) - 1, min(KEPT, len(flat)), dtype=torch.float64).long()
    return {
        "shape": list(values.shape),
        "largest": float(flat.abs().max()),
        "values": [float(value) for value in flat[places]],
        "tolerance": TOLERANCE,
    }


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference of two answers, relative to the largest value; inf when they do not compare."""
    if one.shape != other.shape:
        return float("inf")
    size = float(one.float().abs().max())
    found = float((one.float() - other.float()).abs().max())
    return found / size if size > 0 else found
