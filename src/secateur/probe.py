"""A probe: a seeded input, and what the model answers. Kept beside the weights, so that a reload can be checked anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import Batch

TOKENS, DECODER_TOKENS = 16, 8
KEPT = 16  # output values written down
TOLERANCE = 1e-3  # of the largest output, for computing on another machine or with another kernel


def probe_batch(model: nn.Module, seed: int) -> Batch | None:
    """An input of the right shape from the model's config, or None when the config does not tell one."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(seed)
    batch: dict[str, Tensor] = {}
    if main == "input_ids":
        batch["input_ids"] = _ids(config, TOKENS, generator)
    elif main == "pixel_values":
        size = _first(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        batch["pixel_values"] = torch.randn(1, _first(config, "num_channels", 3), height, width, generator=generator)
    elif main == "input_features":
        frames = 2 * _first(config, "max_source_positions", 1500)
        batch["input_features"] = torch.randn(1, _first(config, "num_mel_bins", 80), frames, generator=generator)
    elif main == "input_values":
        batch["input_values"] = torch.randn(1, 16000, generator=generator)
    else:
        return None
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = _ids(config, DECODER_TOKENS, generator)
    return batch


def _ids(config: Any, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, max(4, min(_first(config, "vocab_size", 1000), 30000)), (1, length), generator=generator)


def _first(config: Any, name: str, default: Any) -> Any:
    """A field of the config or of one of its parts."""
    parts = [config, *(getattr(config, part, None) for part in ("text_config", "vision_config", "decoder"))]
    return next((value for part in parts if (value := getattr(part, name, None)) is not None), default)


def answer(output: Any) -> Tensor:
    """The tensor of a model's output that counts: logits, the last hidden state, or the first tensor there is."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))


def digest(values: Tensor) -> dict[str, Any]:
    """What to write down of an answer: its shape, its size, and KEPT values spread over it."""
    flat = values.detach().float().flatten()
    places = torch.linspace(0, len(flat) - 1, min(KEPT, len(flat))).long()
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
