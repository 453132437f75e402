"""A checkpoint in, a pruned checkpoint out: one block in memory, and the result verified before it gets its name."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur import data as inputs
from secateur.card import card, environment, manifest
from secateur.data import Batch, Data, call
from secateur.data.tensors import TENSOR_SUFFIXES
from secateur.errors import SecateurError
from secateur.forward import no_cache
from secateur.machine import check_device
from secateur.memory import peak_memory, trim
from secateur.plan import Plan, make_plan
from secateur.probe import TOLERANCE, answer, difference, digest, probe_batches, vocabulary
from secateur.prune import Job, LayerReport, Progress, Report, no_progress, run
from secateur.recipe import Recipe
from secateur.stream.observe import make_observable
from secateur.stream.source import Source
from secateur.stream.staging import Staging, staging_folder
from secateur.stream.walk import randomness, walk
from secateur.weights.gradients import Loss

HOLDOUT = 8  # windows of the calibration source, not learned from, on which before and after are measured
RELOAD_WHOLE = 2 << 30  # bytes: results up to this size are reloaded by stock transformers, larger ones by blocks


@dataclass
class Outcome:
    """What riders showed at the end of the model: the loss of each holdout window, and the answers to the probes after
    them, but for those that the model does not take.
    """

    holdout: int
    losses: dict[int, float] = field(default_factory=dict)
    answers: dict[int, Tensor] = field(default_factory=dict)
    windows: list[Tensor] = field(default_factory=list)

    def __call__(self, index: int, output: Any) -> None:
        if index >= self.holdout:
            if output is not None:
                self.answers[index] = answer(output).detach().float().cpu()
            return
        logits = answer(output)[0, :-1].float()
        self.losses[index] = float(nn.functional.cross_entropy(logits, self.windows[index][0, 1:].to(logits.device)))

    @property
    def probe(self) -> tuple[int, Tensor] | None:
        """The first probe that was answered: its number among the riders, and the answer."""
        return min(self.answers.items(), default=None)

    @property
    def perplexity(self) -> float | None:
        """exp of the mean loss; None without windows."""
        return math.exp(min(sum(self.losses.values()) / len(self.losses), 700)) if self.losses else None


class Blocks:
    """Blocks come from the checkpoint, or from the staged result once they are pruned, and go when all have passed."""

    def __init__(self, source: Source, staging: Staging, pruned: Callable[[str], bool]) -> None:
        self.source, self.staging, self.pruned = source, staging, pruned

    def load(self, name: str, module: nn.Module) -> None:
        self.source.free_tables()
        if self.pruned(name):  # whatever is loaded may be dense
            self.source.load(name, self._staged)
        elif any(parameter.is_meta for parameter in module.parameters()):
            self.source.load(name)

    def free(self, name: str, module: nn.Module) -> None:
        if name:
            self.source.free(name)
        trim()

    def _staged(self, name: str) -> Tensor:
        with safe_open(self.staging.read(name), framework="pt", device="cpu") as shard:
            return shard.get_tensor(name)


class Staged:
    """Pruned blocks go to the staging folder, with their reports in its journal."""

    def __init__(self, source: Source, staging: Staging) -> None:
        self.source, self.staging = source, staging

    def done(self, block: str) -> list[LayerReport] | None:
        record = self.staging.record("block", block)
        if record is None:
            return None
        return [LayerReport(**{**layer, "shape": tuple(layer["shape"])}) for layer in record["layers"]]

    def keep(self, block: str, changed: Collection[str], reports: list[LayerReport]) -> None:
        tensors = self.source.parameters(changed)
        self.staging.save(block, tensors, {"layers": [asdict(report) for report in reports]})

    def allocation(self, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Made from the dense weights once: a resumed run finds it in the journal."""
        record = self.staging.record("allocation")
        if record is None:
            record = {"allocation": make()}
            self.staging.note(record)
        return record["allocation"]

    def stored_dtype(self, parameter: str) -> torch.dtype | None:
        return self.source.stored_dtype(parameter)


def prune(
    folder: str | Path,
    recipe: Recipe,
    data: Iterable[Any] | Data | None = None,
    out: str | Path = "pruned",
    *,
    resume: bool = False,
    device: str = "cpu",
    loss: Loss | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Prune a Hugging Face model folder into `out`, which stock transformers loads.

    data: batches to calibrate on; None takes the recipe's calibration source. resume: go on where an unfinished run of
    the same settings stopped. The result is whole or absent; it is loaded again and compared before it gets its name.

    Raises SecateurError for every mistake that can be known before work starts, and when the result does not verify.
    """
    job, source, staging, outcome = prepare(folder, recipe, data, out, resume, device, loss, progress)
    try:
        report = run(job)
        source.checkpoint.close()
        finite = all(math.isfinite(loss) for loss in outcome.losses.values())
        if not finite or (outcome.probe is not None and not bool(torch.isfinite(outcome.probe[1]).all())):
            raise SecateurError(
                "the pruned model gives NaN or Inf on a probe: prune less, or compute in float32 (--dtype float32)"
            )
        after = _measures(outcome, source, report)
        before = (staging.record("before") or {}).get("measures", {})
        report.measures = {"before": before, "after": after}
        report.protected = job.plan.protected
        _write(report, job, source, staging, outcome)
        return report
    except BaseException as error:
        staging.close(failed=isinstance(error, Exception))
        raise


@dataclass
class Examined:
    """An input that has passed every check. data and riders are where the model computes; nothing is written yet.

    riders: the holdout windows, then probes, of which the model takes some.
    """

    source: Source
    plan: Plan
    data: Data | None
    riders: list[Batch]
    holdout: list[Tensor]


def examine(
    folder: str | Path, recipe: Recipe, data: Iterable[Any] | Data | None, out: str | Path, device: str
) -> Examined:
    """Find all that can be wrong with the input. Reads no weights and writes nothing. Raises SecateurError."""
    folder, out = resolve(folder), Path(out)
    check_out(folder, out)
    check_device(device)
    source = Source(folder, recipe.dtype, device)
    if torch.promote_types(source.dtype, source.stored) != source.dtype:
        raise SecateurError(
            f"--dtype {recipe.dtype} would round the weights that stay: they are stored as {_name(source.stored)}.\n"
            "  Compute in that, or leave --dtype out."
        )
    plan = make_plan(source.model, recipe)
    tokenizer = load_tokenizer(folder)
    given = data is not None
    data = _calibration(source, plan, data, tokenizer)
    if plan.needs & {"gradient", "fisher", "curvature"}:
        _fits(source)
    holdout = [] if given else _holdout(source, recipe, tokenizer)
    probes = [*probe_batches(source.model, recipe.seed)]
    if data is not None and not (probes and _alike(probes[0], data.batches[0])):
        probes.append(data.batches[0])
    riders = [_to(batch, source) for batch in (*({"input_ids": window} for window in holdout), *probes)]
    data = (
        None
        if data is None
        else Data([_to(b, source) for b in data.batches], data.description, data.digest, data.tokens)
    )
    return Examined(source, plan, data, riders, holdout)


def _alike(probe: Batch, batch: Batch) -> bool:
    """Whether a model that takes the one takes the other."""
    return all(
        key in probe and (not value.is_floating_point() or value.shape[1:] == probe[key].shape[1:])
        for key, value in batch.items()
    )


def prepare(
    folder: str | Path,
    recipe: Recipe,
    data: Iterable[Any] | Data | None,
    out: str | Path,
    resume: bool,
    device: str,
    loss: Loss | None,
    progress: Progress,
) -> tuple[Job, Source, Staging, Outcome]:
    """Everything up to the first pruned block."""
    found = examine(folder, recipe, data, out, device)
    source, plan, holdout = found.source, found.plan, found.holdout
    staging = Staging(source.checkpoint, Path(out), _settings(source, recipe, found.data), resume)
    try:
        source.load_outside(plan.blocks)
        store = Blocks(source, staging, lambda name: staging.record("block", name) is not None)
        outcome = Outcome(len(holdout), windows=list(holdout))
        dense = Blocks(source, staging, lambda _: False)
        keeper = Staged(source, staging)
        guesses = found.riders[len(holdout) :]
        job = Job(source.model, plan, found.data, store, keeper, progress, loss, found.riders, guesses, outcome, dense)
        if staging.record("before") is None:
            _measure_before(job, source, staging, len(holdout))
        return job, source, staging, outcome
    except BaseException as error:
        staging.close(failed=isinstance(error, Exception))
        raise


def resolve(folder: str | Path) -> Path:
    """A local folder, or a hub id, downloaded where the network allows. Raises SecateurError."""
    path = Path(folder)
    if path.exists():
        return path
    name = str(folder)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise SecateurError(f"{folder} does not exist; expected a local model folder, or a hub id such as org/name")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:
        raise SecateurError(
            f"{folder} is no local folder, and the hub does not give it: {type(error).__name__}.\n"
            "  Check the name and the network, or download the model yourself and give its folder."
        ) from None


def check_out(folder: Path, out: Path) -> None:
    """Raise SecateurError unless `out` is a new place, and it and its staging folder are outside the input."""
    if not out.name or out.name == "..":
        raise SecateurError(f"--out {out} names no new folder: choose one, such as {out / 'pruned'}")
    for place, what in ((out, "is"), (staging_folder(out), "would be written by way of")):
        if place.resolve() == folder.resolve():
            raise SecateurError(
                f"--out {out} {what} the input itself; the input is never changed: choose another folder"
            )
    if folder.resolve() in out.resolve().parents:
        raise SecateurError(f"--out {out} lies inside the input folder {folder}: choose another place")
    if staging_folder(out).resolve() in folder.resolve().parents:
        raise SecateurError(f"--out {out} would be written around the input folder {folder}: choose another place")
    if os.path.lexists(out):
        raise SecateurError(f"--out {out} exists already; nothing is overwritten: choose another name, or delete it")
    if out.parent.exists() and not out.parent.is_dir():
        raise SecateurError(f"--out {out}: {out.parent} is not a folder")


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None when it has none."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")
    if not any((folder / name).exists() for name in names):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        found = (str(error).splitlines() or [type(error).__name__])[0]
        raise SecateurError(
            f"{folder}: its tokenizer does not load ({found}).\n"
            "  Download or export its files again, or move them out of the folder and give pre-tokenized inputs "
            "(--calibration inputs.safetensors)."
        ) from None


def _calibration(source: Source, plan: Plan, data: Any, tokenizer: Any) -> Data | None:
    recipe = plan.recipe
    if isinstance(data, Data):
        return data
    if data is not None:
        return inputs.from_iterable(data, vocab_size=vocabulary(source.model))
    if not recipe.needs():
        return None
    if getattr(source.model, "main_input_name", "input_ids") != "input_ids" and recipe.calibration.source is None:
        raise SecateurError(
            f"{source.folder} takes {source.model.main_input_name}, not text: give calibration inputs as a .safetensors "  # type: ignore[attr-defined]
            "or .npz file with one tensor per argument (--calibration inputs.safetensors), or use --method magnitude."
        )
    return inputs.calibration(
        recipe.calibration.source,
        tokenizer,
        samples=recipe.calibration.samples,
        length=recipe.calibration.length,
        seed=recipe.calibration.seed,
        field=recipe.calibration.field,
        encoder_decoder=bool(getattr(source.model.config, "is_encoder_decoder", False)),  # type: ignore[union-attr]
        vocab_size=vocabulary(source.model),
    )


def _holdout(source: Source, recipe: Recipe, tokenizer: Any) -> list[Tensor]:
    """Windows between the calibration windows: [1, length] each. Only for causal language models with a tokenizer."""
    path = recipe.calibration.source
    causal = "CausalLM" in type(source.model).__name__ or "LMHead" in type(source.model).__name__
    if tokenizer is None or not causal or (path is not None and path.suffix.lower() in TENSOR_SUFFIXES):
        return []
    return inputs.holdout(
        path,
        tokenizer,
        samples=recipe.calibration.samples if recipe.needs() else 0,
        length=recipe.calibration.length,
        count=HOLDOUT,
        seed=recipe.calibration.seed,
        field=recipe.calibration.field,
    )


def _to(batch: Batch, source: Source) -> Batch:
    return {
        key: value.to(source.device, source.dtype if value.is_floating_point() else value.dtype)
        for key, value in batch.items()
    }


def _settings(source: Source, recipe: Recipe, data: Data | None) -> dict[str, Any]:
    return {
        "recipe": recipe.model_dump(mode="json"),
        "model": source.checkpoint.fingerprint(),
        "data": "" if data is None else data.digest,
        "compute": [str(source.dtype), str(source.device)],
        "versions": environment(),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fits(source: Source) -> None:
    """Gradients need the whole model, its gradients and their sums in memory. Raises SecateurError when they do not fit."""
    from secateur.memory import available_memory

    size = sum(parameter.numel() for parameter in source.model.parameters())
    needed, free = 12 * size + 4 * size, available_memory()
    if source.device.type == "cpu" and needed > free:
        raise SecateurError(
            f"a criterion that reads the loss's gradient needs the whole model in memory: about {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free.\n  Use wanda, sparsegpt or admm, which work block by block."
        )


def _measure_before(job: Job, source: Source, staging: Staging, holdout: int) -> None:
    """One pass of the dense model over the holdout windows."""
    outcome = Outcome(holdout, windows=[batch["input_ids"] for batch in job.riders[:holdout]])
    if holdout:
        pass_through(job, job.riders[:holdout], outcome, "measure")
    staging.note({"before": 1, "measures": _size(source, outcome)})


def pass_through(job: Job, batches: list[Batch] | Any, finish: Callable[[int, Any], None], stage: str) -> None:
    """Run batches through the whole model, a block in memory at a time."""
    total = len(job.plan.blocks)
    for done, visit in enumerate(walk(job.forward, job.plan.blocks, batches, job.store, finish, range(len(batches)))):
        job.progress(stage, done, total, visit.name)


def _size(source: Source, outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = {"bytes": source.checkpoint.bytes}
    if outcome.perplexity is not None:
        found["perplexity"] = outcome.perplexity
        found["windows"] = len(outcome.losses)
    return found


def _measures(outcome: Outcome, source: Source, report: Report) -> dict[str, Any]:
    return _size(source, outcome) | {"sparsity": report.sparsity}


def _write(report: Report, job: Job, source: Source, staging: Staging, outcome: Outcome) -> None:
    """Put the result together, reload it, compare, and only then give it its name."""
    started = time.perf_counter()
    copies = source.other_files()
    probe = None if outcome.probe is None else _described(outcome, job)
    folder = staging.assemble({"README.md": card(report, source.folder).encode()}, copies)
    job.progress("verify", 0, 1, "reload")
    source.free_tables()
    how, found = verify(folder, job, source, report, outcome.probe)
    report.seconds["verify"] = time.perf_counter() - started
    report.verified = {"how": how, "difference": found, "tolerance": None if found is None else TOLERANCE}
    report.peak_memory = peak_memory()
    details = manifest(report, source.folder, probe, job.plan.recipe.seed)
    staging.add("secateur.json", json.dumps(details, indent=2, allow_nan=False).encode())
    staging.finish()
    job.progress("verify", 1, 1, "done")


def _described(outcome: Outcome, job: Job) -> dict[str, Any]:
    """What to write down of the probe: which guess it is, its shapes, and the answer."""
    assert outcome.probe is not None
    index, found = outcome.probe
    shapes = {key: list(value.shape) for key, value in job.riders[index].items()}
    return {"guess": index - outcome.holdout, "inputs": shapes, **digest(found)}


def verify(
    folder: Path, job: Job, source: Source, report: Report, probe: tuple[int, Tensor] | None
) -> tuple[str, float | None]:
    """Load the result again and compare the probe's answer with the one from memory: (how, relative difference). Without
    an answered probe: the zeros in the files, (how, None).

    Raises SecateurError when they differ.
    """
    if probe is None:
        _zeros_are_there(folder, job, source, report)
        return "zeros counted in the files; outputs not compared: the config does not tell what the model takes", None
    batch, expected = job.riders[probe[0]], probe[1]
    if source.checkpoint.bytes <= RELOAD_WHOLE:
        how = "stock transformers"
        model = type(source.model).from_pretrained(folder, dtype=source.dtype).to(source.device).eval()  # type: ignore[attr-defined]
        make_observable(model)
        with torch.no_grad(), randomness([]):
            found = answer(call(model, batch, **no_cache(model))).float().cpu()
    else:
        how = "block by block"
        found = _reloaded_by_blocks(folder, job, source, batch)
    apart = difference(expected, found)
    if not apart <= TOLERANCE:
        raise SecateurError(
            f"the reloaded result ({how}) differs from what was in memory by {apart:.2g} of the largest output "
            f"(tolerance {TOLERANCE:g}). It was not given its name; please report this."
        )
    return how, apart


def _zeros_are_there(folder: Path, job: Job, source: Source, report: Report) -> None:
    again = Source(folder, _name(source.dtype), str(source.device))
    layers = {setting.layer.name: setting.layer for setting in job.plan.settings}
    for found in report.layers:
        layer = layers[found.name]
        module = layer.parameter.rpartition(".")[0]
        again.load(module)
        if int((layer.matrix(again.model.get_parameter(layer.parameter)) == 0).sum()) < found.removed:
            raise SecateurError(f"{found.name} has fewer zeros on the disk than in memory; please report this")
        again.free(module)


def _reloaded_by_blocks(folder: Path, job: Job, source: Source, batch: Batch) -> Tensor:
    again = Source(folder, _name(source.dtype), str(source.device))
    outcome = Outcome(0)
    plan = make_plan(again.model, job.plan.recipe)
    again.load_outside(plan.blocks)
    store = Blocks(again, None, lambda _: False)  # type: ignore[arg-type]
    fresh = Job(again.model, plan, None, store, job.keeper, job.progress)
    pass_through(fresh, [batch], outcome, "verify")
    return outcome.answers[0]
