"""A checkpoint that does not fit into memory: traced on the meta device, scored and cut one tensor after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from secateur.data import Batch
from secateur.errors import SecateurError
from secateur.forward import no_cache
from secateur.memory import peak_memory
from secateur.prune import Progress
from secateur.smaller.request import DEPTH, Shrunk, Smaller
from secateur.smaller.result import finish, staged
from secateur.stream.source import Source
from secateur.structure import importance, plan, trace
from secateur.structure.criteria import CRITERIA
from secateur.structure.saved import write_config
from secateur.structure.shards import check_shards, cut_checkpoint, tensors_of_source


def remove_on_shards(
    folder: Path, wanted: Smaller, out: Path, examples: Sequence[Batch], progress: Progress, write: bool
) -> Shrunk:
    """Trace and prove on the meta device, score and cut one tensor after the other."""
    started = time.perf_counter()
    criterion = wanted.criterion or "magnitude"
    whole = sorted(DEPTH & set(wanted.remove or {}))
    if CRITERIA[criterion].needs or whole:
        what = f"removing {whole[0]}" if whole else f"the criterion {criterion}"
        raise SecateurError(
            f"{what} needs the whole model in memory, and it does not fit: --criterion magnitude works on the shards"
        )
    source = Source(folder, "auto", "cpu")
    model = without_memory(source.model)
    progress("trace", 0, 1, type(model).__name__)
    example = {**examples[0], **no_cache(model)}
    couplings = trace(model, example)
    progress("score", 0, 1, criterion)
    scores = importance(couplings, criterion, seed=wanted.seed, tensors=tensors_of_source(source))
    found = plan(couplings, **wanted.choice(wanted.remove), scores=scores)
    size = source.checkpoint.bytes
    result = Shrunk(
        [found],
        "",
        {"params": found.before["params"], "bytes": size},
        {"params": found.after["params"]},
        criterion,
        "none",
    )
    if not write:
        return result
    with staged(out) as staging:
        progress("cut", 0, 1, found.promise)
        cut_checkpoint(source, found, staging)
        result.loads_with = write_config(model, found, folder, staging)
        progress("verify", 0, 1, "shards")
        check_shards(source, found, staging)
        result.after["bytes"] = sum(path.stat().st_size for path in staging.glob("*.safetensors"))
        result.seconds = {"total": time.perf_counter() - started}
        result.peak_memory = peak_memory()
        finish(staging, out, result, wanted, folder, source.other_files())
    progress("verify", 1, 1, "done")
    return result


def without_memory(skeleton: nn.Module) -> nn.Module:
    """The same model, buffers and all, on the meta device."""
    with torch.device("meta"):
        model = type(skeleton)._from_config(skeleton.config)  # type: ignore[attr-defined]
    model.tie_weights()
    return model.eval()
