"""A Hugging Face folder in, a smaller one out, verified before it gets its name."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import data as inputs
from secateur.data import Batch, Data
from secateur.data.tensors import TENSOR_SUFFIXES
from secateur.errors import SecateurError
from secateur.forward import no_cache
from secateur.machine import check_device
from secateur.memory import available_memory, peak_memory
from secateur.pipeline import check_out, load_tokenizer, resolve
from secateur.probe import probe_batches, vocabulary
from secateur.prune import Progress, no_progress
from secateur.smaller.request import DEPTH, Shrunk, Smaller
from secateur.smaller.result import check_whole, finish, staged
from secateur.smaller.shards import remove_on_shards, without_memory
from secateur.smaller.work import Work
from secateur.stream.checkpoint import DTYPES
from secateur.stream.observe import make_observable
from secateur.stream.skeleton import build, check_folder
from secateur.stream.source import Source
from secateur.structure import save, trace
from secateur.structure.criteria import CRITERIA
from secateur.structure.survey import Survey, survey

HOLDOUT = 8  # windows on which a language model is measured before and after
SMALL = 200_000_000  # parameters of a model that is looked at with random weights


def remove(
    folder: str | Path,
    wanted: Smaller,
    out: str | Path,
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
    write: bool = True,
    in_memory: bool | None = None,
) -> Shrunk:
    """Remove structure from a Hugging Face model folder into `out`; without `write`, only find out what would remain.

    in_memory: hold the whole model in memory, or cut the checkpoint on its shards, where criteria that run data are not
    to be had; None: as it fits. `out` is whole or absent: it is loaded again and its answers are compared before it
    gets its name. Raises SecateurError for every mistake that can be known before work starts, and when the proof fails.
    """
    started = time.perf_counter()
    folder, out = resolve(folder), Path(out)
    if write:
        check_out(folder, out)
    check_device(device)
    check_folder(folder)
    check_whole(folder)
    skeleton = build(folder, torch.float32)
    examples = _examples(skeleton, wanted.seed)
    if not fits_memory(skeleton) if in_memory is None else not in_memory:
        return remove_on_shards(folder, wanted, out, examples, progress, write)
    source = Source(folder, "auto", "cpu")  # an error for a broken checkpoint, before it is loaded
    criterion, data, holdout = _data(folder, skeleton, wanted)
    model = _loaded(folder, type(skeleton), device)
    example = {**_first_that_runs(model, _on(device, examples)), **no_cache(model)}
    batches = _on(device, () if data is None else data.batches)
    types = _stored(source)
    held = [window.to(device) for window in holdout]
    work = Work(model, example, batches, held, criterion, wanted, progress, stored=types)
    config = copy.deepcopy(model.config)
    stored = {id(p): types[name] for name, p in model.named_parameters(remove_duplicate=False) if name in types}
    with staged(out) if write else contextlib.nullcontext() as staging:
        found = work.shrink(lambda: _loaded(folder, type(skeleton), device))
        found.calibration = "none" if data is None else data.description
        if staging is None:
            return found
        progress("verify", 0, 1, "reload")
        _round(model, stored)
        found.loads_with = save(model, found.plans, staging, config, [example, _longer(example)])
        found.after["bytes"] = sum(path.stat().st_size for path in staging.glob("*.safetensors"))
        found.before["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found.seconds["total"] = time.perf_counter() - started
        found.peak_memory = peak_memory()
        finish(staging, out, found, wanted, folder, source.other_files())
    progress("verify", 1, 1, "done")
    return found


def _on(device: str, batches: Sequence[Batch]) -> list[Batch]:
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def _longer(example: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with more tokens."""
    return {key: torch.cat([v, v[:, :5]], 1) if key.endswith("ids") else v for key, v in example.items()}


def _examples(model: nn.Module, seed: int) -> list[Batch]:
    """Inputs of the right shape, of two lengths: what the model is traced, proven and reloaded on."""
    found = probe_batches(model, seed)
    if not found:
        raise SecateurError(
            f"{type(model).__name__}: its config does not tell what it takes. Trace it in Python, on inputs of yours: "
            "secateur.structure.trace(model, example_inputs)."
        )
    return found


def _first_that_runs(model: nn.Module, examples: Sequence[Batch]) -> Batch:
    failures = []
    for batch in examples:
        try:
            with torch.no_grad():
                model(**batch, **no_cache(model))
            return batch
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            failures.append(str(error).split("\n")[0])
    raise SecateurError(f"{type(model).__name__} runs on none of the inputs that its config suggests: {failures[0]}")


def _data(folder: Path, model: nn.Module, wanted: Smaller) -> tuple[str, Data | None, list[Tensor]]:
    """The criterion, the calibration data that it reads, and windows of text that nothing is learned from."""
    tokenizer = load_tokenizer(folder)
    writes = any(part in type(model).__name__ for part in ("CausalLM", "LMHead"))
    criterion = wanted.criterion or ("taylor" if writes and tokenizer is not None else "magnitude")
    asked = wanted.calibration
    layers = DEPTH & set(wanted.remove or {})
    holdout = []
    if (
        writes
        and tokenizer is not None
        and (asked.source is None or asked.source.suffix.lower() not in TENSOR_SUFFIXES)
    ):
        holdout = inputs.holdout(
            asked.source,
            tokenizer,
            samples=asked.samples,
            length=asked.length,
            count=HOLDOUT,
            seed=asked.seed,
            field=asked.field,
        )
    if not CRITERIA[criterion].needs and not layers and asked.source is None:
        return criterion, None, holdout
    if asked.source is None and (tokenizer is None or not writes):
        if not CRITERIA[criterion].needs:
            return criterion, None, holdout
        raise SecateurError(
            f"the criterion {criterion} reads data: give --calibration, a .safetensors or .npz file with one tensor for "
            "each argument of the model, or choose --criterion magnitude."
        )
    found = inputs.calibration(
        asked.source,
        tokenizer,
        samples=inputs.samples(asked),
        length=asked.length,
        seed=asked.seed,
        field=asked.field,
        encoder_decoder=bool(getattr(model.config, "is_encoder_decoder", False)),  # type: ignore[union-attr]
        vocab_size=vocabulary(model),
    )
    return criterion, found, holdout


def fits_memory(model: nn.Module) -> bool:
    """Whether the model can be held in float32, and most of it a second time for the proof."""
    return 2.5 * 4 * sum(p.numel() for p in model.parameters()) < available_memory()


def look(skeleton: nn.Module, seed: int = 0) -> Survey:
    """What can be removed from the model of a config. Its weights do not matter: random ones do for a small model, and none
    for a large one.
    """
    small = sum(p.numel() for p in skeleton.parameters()) < SMALL
    if small:
        model = type(skeleton)._from_config(copy.deepcopy(skeleton.config), dtype=torch.float32).eval()  # type: ignore
        make_observable(model)
        example = _first_that_runs(model, _examples(model, seed))
    else:
        model = without_memory(skeleton)
        example = _examples(model, seed)[0]
    return survey(trace(model, {**example, **no_cache(model)}))


def _loaded(folder: Path, kind: Any, device: str) -> Any:
    """The model in float32."""
    model = kind.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    make_observable(model)
    return model


def _stored(source: Source) -> dict[str, torch.dtype]:
    """Name of a tensor -> what the checkpoint stores it as."""
    found = {}
    for group in source.naming.groups.values():
        entry = source.checkpoint.entries[group.sources[0][0]]
        found |= dict.fromkeys(group.members, DTYPES[entry.dtype])
    return found


def _round(model: nn.Module, stored: Mapping[int, torch.dtype]) -> None:
    """Parameters as they are stored; buffers that no checkpoint has keep what they were computed in."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(stored.get(id(parameter), parameter.dtype))
