"""Compare a pruned model folder with the dense one on a text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import windows
from secateur.data.text import load_text
from secateur.errors import SecateurError
from secateur.machine import check_device
from secateur.measure.quality import Comparison, Progress, Quality, compare, evaluate
from secateur.memory import available_memory
from secateur.pipeline import load_tokenizer, resolve
from secateur.recipe import DTYPES, nearest
from secateur.stream.checkpoint import needs_ours, open_checkpoint, read_json
from secateur.structure.saved import load


@dataclass(frozen=True)
class Evaluation:
    """comparison is there when a dense model was given; quality is the pruned model's in any case."""

    model: str
    against: str | None
    text: str
    windows: int
    length: int
    quality: Quality
    comparison: Comparison | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = {"model": self.model, "against": self.against, "text": self.text}
        found |= {"windows": self.windows, "length": self.length}
        return found | (
            self.comparison.as_dict() if self.comparison is not None else {"pruned": self.quality.as_dict()}
        )


def evaluate_folder(
    folder: str | Path,
    text: Path,
    against: str | Path | None = None,
    *,
    field: str | None = None,
    samples: int = 64,
    length: int = 512,
    device: str = "cpu",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model on evenly spaced windows of a text; beside another one also KL and agreement, paired.

    Raises SecateurError, before a model is loaded where it can be known: when the text is too short, or when the two do
    not have the same tokenizer and vocabulary.
    """
    check_device(device)
    if dtype not in DTYPES:
        raise SecateurError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}; known: {', '.join(DTYPES)}")
    if against is not None and samples < 2:
        raise SecateurError(f"--samples {samples}: a comparison with intervals needs 2 windows or more")
    folders = [resolve(place) for place in (folder, against) if place is not None]
    ids, note = _ids(folders, text, field, samples, length)
    _fit(folders, device, dtype)
    models = [_load(place, device, dtype) for place in folders]
    names = [str(folder), None if against is None else str(against)]
    if len(models) == 1:
        quality = evaluate(models[0], ids, progress=progress)
        return Evaluation(str(names[0]), None, note, samples, length, quality)
    comparison = compare(models[1], models[0], ids, progress=progress)
    return Evaluation(str(names[0]), names[1], note, samples, length, comparison.pruned, comparison)


def _ids(folders: list[Path], path: Path, field: str | None, samples: int, length: int) -> tuple[Tensor, str]:
    """Windows of the text [samples, length], and a note on the text; the tokenizers have to agree on them."""
    sizes = {folder: _vocabulary(folder) for folder in folders}
    if len(set(sizes.values())) > 1:
        found = " and ".join(f"{size:,} in {folder}" for folder, size in sizes.items())
        raise SecateurError(f"the vocabularies differ ({found} ids); only models of one tokenizer can be compared")
    tokenizers = {folder: found for folder in folders if (found := load_tokenizer(folder)) is not None}
    if not tokenizers:
        raise SecateurError(f"{folders[0]} has no tokenizer, so the text cannot be encoded; copy its files there")
    text, note = load_text(path, field)
    cut = [windows(text, tokenizer, length, samples, seed=None) for tokenizer in tokenizers.values()]
    if any(not torch.equal(cut[0], other) for other in cut[1:]):
        raise SecateurError(
            f"the tokenizers of {folders[0]} and {folders[1]} encode {path} differently; only models of one tokenizer can "
            "be compared"
        )
    return cut[0], note


def _vocabulary(folder: Path) -> int:
    config = read_json(folder / "config.json")
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    return size if isinstance(size, int) else 0


def _fit(folders: list[Path], device: str, dtype: str) -> None:
    """Raise SecateurError when the models do not fit in memory together."""
    needed, free = 0, available_memory()
    for folder in folders:
        entries = open_checkpoint(folder).entries.values()
        wide = 4 if dtype == "auto" else getattr(torch, dtype).itemsize
        needed += sum(math.prod(entry.shape) * wide for entry in entries)
    if device == "cpu" and needed > free:
        raise SecateurError(
            f"{'both models' if len(folders) > 1 else folders[0]} in memory take about {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free.\n  Use --dtype bfloat16, another device, or a machine with more memory."
        )


def _load(folder: Path, device: str, dtype: str) -> nn.Module:
    """By stock transformers, from safetensors only, without remote code; what it cannot build by `structure.load`."""
    from transformers import AutoModelForCausalLM

    wanted: Any = (torch.float32 if device == "cpu" else "auto") if dtype == "auto" else getattr(torch, dtype)
    if needs_ours(folder):
        model = load(folder).to(torch.device(device))
        for parameter in model.parameters() if wanted != "auto" else ():
            parameter.data = parameter.data.to(wanted)
        return model
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted, trust_remote_code=False, use_safetensors=True
        )
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise SecateurError(f"{folder} does not load as a causal language model: {first}") from None
    return model.to(torch.device(device)).eval()  # type: ignore[arg-type]
