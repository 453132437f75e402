"""The main job, end to end, on the model that ships: prune it in several ways, reload, measure, compare."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import Data, from_iterable, windows
from secateur.demo import MODEL
from secateur.demo.tasks import TASKS, accuracy, corpus
from secateur.measure.quality import evaluate
from secateur.pipeline import prune
from secateur.prune import Progress, no_progress
from secateur.recipe import Recipe, method

WINDOWS, LENGTH = 64, 128
EXAMPLES = 100  # per task
ROUNDS = 15  # of latency


@dataclass(frozen=True)
class Row:
    """One model of the table. bytes of the weights on disk; latency in milliseconds for one window."""

    name: str
    sparsity: float
    bytes: int
    perplexity: float
    accuracy: dict[str, float]
    latency: float


def recipes() -> dict[str, Recipe]:
    """What the demo compares."""
    return {
        "magnitude 50 %": method("magnitude", sparsity=0.5),
        "admm 50 %": method("admm", sparsity=0.5),
        "admm 70 %": method("admm", sparsity=0.7),
        "admm 2:4": method("admm", granularity="2:4"),
    }


def demo(out: Path | None = None, progress: Progress = no_progress) -> list[Row]:
    """Prune the shipped model by each recipe and measure it beside the dense one. The folders go below `out`, where given.

    Raises SecateurError when `out` has results already.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) if out is None else out
        tokenizer, data, test = _inputs()
        folders, sparsities = {"dense": MODEL}, {"dense": 0.0}
        for name, recipe in recipes().items():
            folders[name] = root / name.replace(" ", "").replace("%", "").replace(":", "-")
            sparsities[name] = prune(MODEL, recipe, data, folders[name], progress=progress).sparsity
        models = {name: _load(folder) for name, folder in folders.items()}
        latencies = _latencies(models, test[0], progress)
        rows = []
        for index, (name, model) in enumerate(models.items()):
            progress("evaluate", index, len(models), name)
            size = sum(path.stat().st_size for path in folders[name].glob("*.safetensors"))
            scores = {task: accuracy(model, tokenizer, task, EXAMPLES, seed=1) for task in TASKS}
            perplexity = evaluate(model, test).perplexity
            rows.append(Row(name, sparsities[name], size, perplexity, scores, latencies[name]))
        progress("evaluate", len(models), len(models), "done")
        return rows


def _inputs() -> tuple[Any, Data, Tensor]:
    """Tokenizer, calibration batches from the training split, test windows [WINDOWS, LENGTH]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    learn, test = (
        windows("\n".join(corpus(2000, seed=2, split=split)), tokenizer, LENGTH, WINDOWS, seed=None)
        for split in ("train", "test")
    )
    return tokenizer, from_iterable([{"input_ids": window[None]} for window in learn]), test


def _load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _latencies(models: dict[str, nn.Module], window: Tensor, progress: Progress) -> dict[str, float]:
    """Median milliseconds of a forward of one window, the models taking turns."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for turn in range(ROUNDS):
            progress("latency", turn, ROUNDS, "interleaved")
            for name, model in models.items():
                started = time.perf_counter()
                model(input_ids=window[None], use_cache=False)
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}
