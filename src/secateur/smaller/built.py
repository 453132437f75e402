"""A module that a function of the user's builds, made smaller: `secateur.load(folder, build())` gives it back."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur import data as inputs
from secateur.data.tensors import TENSOR_SUFFIXES
from secateur.errors import SecateurError
from secateur.machine import check_device
from secateur.memory import peak_memory
from secateur.module import find_function, fresh, open_weights
from secateur.pipeline import check_out
from secateur.probe import answer
from secateur.prune import Progress, no_progress
from secateur.smaller.request import DEPTH, Shrunk, Smaller
from secateur.smaller.result import finish, staged
from secateur.smaller.work import GRADIENTS, Work
from secateur.structure import load, save
from secateur.structure.criteria import CRITERIA
from secateur.weights.gradients import Loss

LABELS = "labels"
Batches = list[dict[str, Tensor]]


def remove_built(
    build: str,
    weights: str | Path,
    wanted: Smaller,
    out: str | Path,
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
    write: bool = True,
) -> Shrunk:
    """Remove structure from the module that `build` ("package.module:function") makes, with the weights of a safetensors
    file. The calibration file has a tensor for each argument of its forward; it is traced on the first two samples.

    A classifier whose forward takes no labels is given them under that name in the same file, for criteria that need a
    loss: then that is cross-entropy. `out` is whole or absent: it is loaded into a module built anew before it gets its
    name. Raises SecateurError for every mistake that can be known before work starts, and when the proof fails.
    """
    started = time.perf_counter()
    path, out = Path(weights), Path(out)
    check_device(device)
    if write:
        check_out(path, out)
    checkpoint = open_weights(path)
    make = find_function(build)
    module = fresh(make, checkpoint, "auto", device)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    criterion = wanted.criterion or "magnitude"
    batches, description = _batches(wanted, module, device)
    if len(batches) < 2:
        raise SecateurError("a module is traced on two samples at least: give more, or --samples 2")
    given = [_without_labels(batch, module) for batch in batches]
    example = {key: torch.cat([batch[key] for batch in given[:2]]) for key in given[0]}
    gradients = bool(CRITERIA[criterion].needs & GRADIENTS)
    loss = _loss(module, batches) if gradients else None
    work = Work(module, example, given, (), criterion, wanted, progress, loss, labelled=batches)
    with staged(out) if write else contextlib.nullcontext() as staging:
        found = work.shrink(lambda: fresh(make, checkpoint, "auto", device))
        if CRITERIA[criterion].needs or DEPTH & set(wanted.remove or {}):
            found.calibration = description
        if staging is None:
            return found
        progress("verify", 0, 1, "reload")
        found.loads_with = save(module, found.plans, staging, checks=[example])
        load(staging, make())
        found.before["bytes"] = checkpoint.bytes
        found.after["bytes"] = sum(file.stat().st_size for file in staging.glob("*.safetensors"))
        found.seconds["total"] = time.perf_counter() - started
        found.peak_memory = peak_memory()
        finish(staging, out, found, wanted, path.parent)
    progress("verify", 1, 1, "done")
    return found


def _batches(wanted: Smaller, module: nn.Module, device: str) -> tuple[Batches, str]:
    """Inputs, one sample each."""
    asked = wanted.calibration
    if asked.source is None or asked.source.suffix.lower() not in TENSOR_SUFFIXES:
        arguments = ", ".join(inspect.signature(module.forward).parameters)
        found = "there is none" if asked.source is None else f"{asked.source} is none"
        raise SecateurError(
            f"a module of your own is traced on tensors, and {found}: give a .safetensors or .npz file with one tensor for "
            f"each argument of its forward ({arguments}), the first dimension being the sample\n"
            "  (--calibration inputs.safetensors, with at least two samples)"
        )
    data = inputs.calibration(asked.source, None, samples=inputs.samples(asked), length=asked.length, seed=asked.seed)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

    def fit(value: Tensor) -> Tensor:
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    return [{key: fit(value) for key, value in batch.items()} for batch in data.batches], data.description


def _without_labels(batch: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """What the forward takes."""
    takes = LABELS in inspect.signature(module.forward).parameters
    return {key: value for key, value in batch.items() if takes or key != LABELS}


def _loss(module: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Loss | None:
    """Cross-entropy of a classifier that is told its labels apart from its inputs; None: the module's own loss."""
    if LABELS in inspect.signature(module.forward).parameters:
        return None
    if any(LABELS not in batch for batch in batches):
        raise SecateurError(
            "this criterion needs a loss: add a tensor `labels` [samples] with the classes to the calibration file, or "
            "choose --criterion magnitude, activation or flap"
        )

    labels = torch.cat([batch[LABELS].flatten() for batch in batches])
    with torch.no_grad():
        logits = answer(module(**_without_labels(batches[0], module)))
    if logits.ndim != 2 or len(labels) != len(batches) or labels.is_floating_point():
        raise SecateurError(
            f"labels: expected one class [samples] for logits [samples, classes]; found {list(batches[0][LABELS].shape)} "
            f"{str(labels.dtype).removeprefix('torch.')} of a sample, and outputs {list(logits.shape)}"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise SecateurError(
            f"labels are {int(labels.min())} to {int(labels.max())}; the module has {logits.shape[1]} classes, 0 to "
            f"{logits.shape[1] - 1}"
        )

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(answer(module(**_without_labels(batch, module))), batch[LABELS].flatten().long())

    return loss
