"""Rounds: cut, settle batch norms, train, measure; go on while it holds, halve the last step, keep the best."""

from __future__ import annotations

import copy
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.card import environment
from secateur.data.images import Epochs
from secateur.errors import SecateurError
from secateur.measure.classify import Answers, Loss, NotFinite, answers, lost
from secateur.measure.classify import as_dict as described
from secateur.measure.costs import costs, latency
from secateur.module import fresh, open_weights
from secateur.pipeline import check_out
from secateur.probe import TOLERANCE, answer, difference
from secateur.recover import finetune_, settle_
from secateur.recover.finetune import CHECKPOINT, EVENTS, LOG, Diverged
from secateur.state import LOCK, alone, begun, disk
from secateur.strategy import pages
from secateur.strategy.propose import IMAGES, Case, examine
from secateur.strategy.request import Strategy, check_apart
from secateur.stream.checkpoint import DTYPES
from secateur.training.masks import Masks, named
from secateur.training.moment import deviations
from secateur.training.pruner import Pruner
from secateur.training.rewind import cut, progresses

STATE, BATCH = "state.json", 64

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Trial:
    """A round. progress: on the way to the recipe's sparsity; 0: the dense model, trained equally. cut: what was measured
    before training; verdict: holds, or why not.
    """

    number: int
    progress: float
    sparsity: float
    verdict: str
    measures: dict[str, Any]
    cut: dict[str, Any]
    costs: dict[str, Any]
    latency: dict[str, float]
    seconds: float

    @property
    def holds(self) -> bool:
        return _held(self.verdict)


@dataclass
class Outcome:
    """What the rounds came to. best: the number of the trial that was kept; -1: none held, the model is as it was given."""

    wanted: Strategy
    dense: dict[str, Any]
    dense_costs: dict[str, Any]
    trials: list[Trial]
    best: int
    ended: str
    verified: float = 0.0
    seconds: float = 0.0
    layers: dict[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> Trial | None:
        """The trial that was kept."""
        return next((trial for trial in self.trials if trial.number == self.best), None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "format": 1,
            "versions": environment(),
            "recipe": self.wanted.model_dump(mode="json"),
            "dense": self.dense,
            "dense_costs": self.dense_costs,
            "trials": [asdict(trial) for trial in self.trials],
            "best": self.best,
            "sparsity": self.kept.sparsity if self.kept else 0.0,
            "ended": self.ended,
            "layers": self.layers,
            "verified": self.verified,
            "seconds": self.seconds,
        }


@dataclass
class _Work:
    """Rounds that are under way. sample: what batch norms are settled by, and the dense model's answers to it; beginning:
    what weights are rewound to, where they are.
    """

    wanted: Strategy
    case: Case
    folder: Path
    dense: Answers
    sample: tuple[list[tuple[Tensor, Tensor]], Answers]
    reference: nn.Module
    beginning: dict[str, Tensor] | None
    progress: Progress
    trials: list[Trial] = field(default_factory=list)
    best: int = -1


def run_rounds(
    wanted: Strategy,
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    progress: Progress,
    case: Case | None = None,
) -> Outcome:
    """Go through the rounds of a strategy. `out` gets model.safetensors, a page with plots, and every figure; it appears
    when all is done and what was written gives the same answers in a fresh module.

    Raises SecateurError for every mistake that can be known before work starts. Stopped, it goes on with resume.
    """
    started = time.perf_counter()
    check_out(wanted.weights, out)
    check_apart(out, wanted.data)
    case = case or examine(wanted, device)
    folder = out.with_name(f"{out.name}.partial")
    key = _key(wanted, case)
    trials, best = _begin(folder, key, resume)
    with alone(folder):
        reference = fresh(case.make, case.weights, "auto", device)
        progress("measure", 0, 1, "the dense model")
        dense = answers(reference, case.sets.test.batches(BATCH, device))
        batches = case.batches(IMAGES)
        sample = (batches, answers(reference, batches))
        beginning = _beginning(wanted, case, reference)
        work = _Work(wanted, case, folder, dense, sample, reference, beginning, progress, trials, best)
        earlier = sum(trial.seconds for trial in trials)
        ended = _all(work, key)
        outcome = Outcome(
            wanted,
            described(dense),
            costs(reference, _example(case)).as_dict(),
            work.trials,
            work.best,
            ended,
            seconds=time.perf_counter() - started + earlier,
        )
        _finish(work, outcome, out)
    return outcome


def _all(work: _Work, key: dict[str, Any]) -> str:
    """Every round; returns why it ended."""
    wanted = work.wanted
    _round(work, key, 0.0)
    low = 0.0
    for place in progresses(wanted.recipe, wanted.rounds.keep):
        if (trial := _round(work, key, place)).holds:
            low = place
            if goal := _goal(wanted, trial):
                return goal
            continue
        high = place
        for _ in range(wanted.rounds.bisect):
            middle = (low + high) / 2
            if (trial := _round(work, key, middle)).holds:
                low = middle
                if goal := _goal(wanted, trial):
                    return goal
            else:
                high = middle
        failed = next(t for t in work.trials if not t.holds and t.progress > 0)
        return f"{failed.sparsity:.1%} did not hold: {failed.verdict}"
    return "the recipe's sparsity was reached"


def _round(work: _Work, key: dict[str, Any], place: float) -> Trial:
    """A trial, or what an earlier run has of it."""
    known = next((t for t in work.trials if abs(t.progress - place) < 1e-9), None)
    if known is not None:
        return known
    number = len(work.trials)
    started = time.perf_counter()
    case = work.case
    model, masks = _cut(work, place)
    as_cut = _answers(work, model) if place > 0 else work.dense
    given, verdict = _trained(work, model, masks, number, as_cut)
    before = described(as_cut, lost(work.dense, as_cut)) if place > 0 else {}
    example = _example(case)
    times = latency({"dense": work.reference, "pruned": model}, example)
    now = {f"dense_{k}": v for k, v in times["dense"].items()} | times["pruned"]
    found = costs(model, example).as_dict()
    trial = Trial(
        number,
        place,
        masks.sparsity,
        verdict,
        described(given, lost(work.dense, given)),
        {key: before.get(key) for key in ("top1", "drop", "kl")},
        found,
        now,
        time.perf_counter() - started,
    )
    _note(work, key, trial, model)
    return trial


def _trained(work: _Work, model: nn.Module, masks: Masks, number: int, before: Answers) -> tuple[Answers, str]:
    """Train the model of a round, or leave it as it was cut where that held and training breaks it. Returns its answers,
    and whether they hold. before: the answers as it was cut.
    """
    wanted, weights = work.wanted, copy.deepcopy(model.state_dict())
    given = None
    try:
        _train(work, model, masks, number)
        as_stored_(model, work.case)
        given = _finite_answers(work, model)
        verdict = _verdict(wanted, lost(work.dense, given)) if masks.keep else "holds"
    except Diverged as error:
        if not masks.keep:
            raise
        verdict = f"training diverged: {str(error).splitlines()[0]}"
    left = _verdict(wanted, lost(work.dense, before))
    if given is not None and (_held(verdict) or not _held(left)):
        return given, verdict
    model.load_state_dict(weights)
    return before, f"{left}, left as it was cut: once trained, {verdict}" if _held(left) else verdict


def _cut(work: _Work, place: float) -> tuple[nn.Module, Masks]:
    """The best model so far, cut on to a place and rewound, batch norms settled; at 0 just rewound."""
    model, wanted, case = _start(work), work.wanted, work.case
    masks = Masks({})
    if place > 0:
        masks = cut(model, wanted.recipe, _there(model, case), place, deviations(work.reference, case.plan))
    if work.beginning is not None:
        model.load_state_dict(work.beginning)
    if place == 0:
        return model, masks
    masks.apply_(model)
    batches, dense = work.sample
    settle_(model, case.norm_batches(BATCH), lambda: lost(dense, answers(model, batches)).kl)
    as_stored_(model, case)
    return model, masks


def _beginning(wanted: Strategy, case: Case, reference: nn.Module) -> dict[str, Tensor] | None:
    """What weights are rewound to."""
    if wanted.rounds.rewind != "weights":
        return None
    if wanted.rounds.to is None:
        return reference.state_dict()
    return fresh(case.make, open_weights(wanted.rounds.to), "auto", case.device).state_dict()


def as_stored_(model: nn.Module, case: Case) -> None:
    """Round every tensor to what the file will hold, so that what is measured is what is written. Raises Diverged."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            entry = case.weights.entries.get(name)
            if entry is not None and value.is_floating_point():
                value.copy_(value.to(DTYPES[entry.dtype]))
                if not bool(torch.isfinite(value).all()):
                    raise Diverged(f"{name} has no finite values any more in {entry.dtype}: lower lr")


def _start(work: _Work) -> nn.Module:
    """The best model so far. The first cut starts from the dense one, as it was given."""
    model = fresh(work.case.make, work.case.weights, "auto", work.case.device, frozen=False)
    if work.best > 0:
        model.load_state_dict(load_file(work.folder / f"best-{work.best}.safetensors", device=work.case.device))
    return model


def _there(model: nn.Module, case: Case) -> Masks:
    """What earlier rounds left."""
    wanted = {s.layer.parameter for s in case.plan.settings}
    return Masks({name: p.detach() != 0 for name, p in named(model) if name in wanted})


def _train(work: _Work, model: nn.Module, masks: Masks, number: int) -> None:
    wanted, case = work.wanted, work.case
    settings = wanted.finetune.model_copy(update={"seed": wanted.finetune.seed + number})
    batches = Epochs(case.sets.train, settings.batch, settings.seed, settings.augment, case.device)

    def hold(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Pruner:
        return Pruner(
            model, wanted.recipe, optimizer, steps, method="static", masks=masks, start=0.0, end=0.0, every=steps
        )

    trained = {name for name, parameter in named(model) if parameter.requires_grad}
    finetune_(
        model,
        batches,
        settings,
        prune=hold if trained & set(masks.keep) else None,
        teacher=work.reference if settings.distil else None,
        folder=work.folder / f"round-{number}",
        resume=True,
        tensorboard=wanted.rounds.tensorboard,
        progress=lambda stage, done, of, detail: work.progress(stage, done, of, f"round {number}, {detail}"),
    )
    masks.apply_(model)


def _answers(work: _Work, model: nn.Module) -> Answers:
    return answers(model, work.case.sets.test.batches(BATCH, work.case.device))


def _finite_answers(work: _Work, model: nn.Module) -> Answers:
    """Those of a model that was trained. Raises Diverged."""
    try:
        return _answers(work, model)
    except NotFinite as error:
        raise Diverged(f"{error}: lower lr") from None


def _verdict(wanted: Strategy, loss: Loss) -> str:
    """holds, or the rule that it breaks."""
    stop = wanted.stop
    if loss.drop > stop.drop + loss.noise:
        return (
            f"top-1 drops by {100 * loss.drop:.2f} points, more than {100 * stop.drop:.2f} and the noise of "
            f"{100 * loss.noise:.2f}"
        )
    if loss.worst_sure > stop.worst_class * max(loss.drop, stop.drop):
        return (
            f"class {loss.worst_class} surely loses {100 * loss.worst_sure:.1f} points, more than "
            f"{stop.worst_class:g} times "
            "the mean or the tolerance"
        )
    return "holds" if loss.drop <= stop.drop else "holds within the noise"


def _held(verdict: str) -> bool:
    return verdict.startswith("holds")


def _goal(wanted: Strategy, trial: Trial) -> str:
    """Which goal a trial meets; nothing where none does."""
    stop = wanted.stop
    if stop.packed is not None and trial.costs["packed"] <= stop.packed:
        return f"packed, it takes {trial.costs['packed']:,} bytes, within {stop.packed:,}"
    if stop.latency is not None and trial.latency["p50_1"] <= stop.latency:
        return f"an image takes {trial.latency['p50_1']:.2f} ms, within {stop.latency:g}"
    return ""


# What is on the disk


def _key(wanted: Strategy, case: Case) -> dict[str, Any]:
    files = [case.weights.folder / case.weights.shards[0], *([wanted.rounds.to] if wanted.rounds.to else [])]
    stats = [file.stat() for file in files]
    return json.loads(
        json.dumps(
            {
                "recipe": wanted.model_dump(mode="json", exclude={"out"}),
                "weights": [[stat.st_size, stat.st_mtime_ns] for stat in stats],
                "images": case.images_key(),
                "versions": environment(),
            }
        )
    )


def _begin(folder: Path, key: dict[str, Any], resume: bool) -> tuple[list[Trial], int]:
    """What an earlier run has done. Raises SecateurError where it is not to be gone on with."""
    if not folder.exists():
        with disk(folder):
            folder.mkdir(parents=True)
            _write_state(folder, key, -1, [])
        return [], -1
    if not resume:
        raise SecateurError(f"{folder} is what a run that was stopped has left: go on with --resume, or delete it")
    if not begun(folder):
        with disk(folder):
            _write_state(folder, key, -1, [])
        return [], -1
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        known, trials, best = state["key"], [Trial(**row) for row in state["trials"]], int(state["best"])
        if best > 0:
            load_file(folder / f"best-{best}.safetensors")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise SecateurError(f"{folder} is damaged, and cannot be gone on with ({error}): delete it") from None
    if known != key:
        changed = [name for name in key if known.get(name) != key[name]]
        raise SecateurError(
            f"{folder} was made with other settings ({', '.join(changed)}): give the same, or delete it"
        )
    return trials, best


def _note(work: _Work, key: dict[str, Any], trial: Trial, model: nn.Module) -> None:
    """Weights first, then the state that names them: whichever is there belongs together."""
    work.trials.append(trial)
    old = work.best
    with disk(work.folder):
        if trial.holds and trial.progress > 0:
            work.best = trial.number
            _save(model, work.folder / f"best-{trial.number}.safetensors")
        _write_state(work.folder, key, work.best, work.trials)
        if old != work.best:
            (work.folder / f"best-{old}.safetensors").unlink(missing_ok=True)
        (work.folder / f"round-{trial.number}" / CHECKPOINT).unlink(missing_ok=True)


def _write_state(folder: Path, key: dict[str, Any], best: int, trials: list[Trial]) -> None:
    state = {"key": key, "best": best, "trials": [asdict(trial) for trial in trials]}
    partial = folder / f"{STATE}.partial"
    partial.write_text(json.dumps(state, indent=1), encoding="utf-8")
    os.replace(partial, folder / STATE)


def _save(model: nn.Module, path: Path, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
    seen: dict[int, str] = {}
    tensors = {}
    for name, value in model.state_dict().items():
        if dtypes is not None and name not in dtypes:
            continue
        if seen.setdefault(value.data_ptr(), name) != name and value.numel():
            value = value.clone()
        tensors[name] = value.detach().cpu().to((dtypes or {}).get(name, value.dtype)).contiguous().clone()
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def _finish(work: _Work, outcome: Outcome, out: Path) -> None:
    """The best model as a file with the names and dtypes of the one given, read back and compared; pages and figures."""
    case, model = work.case, _start(work)
    model.eval()
    dtypes = {name: DTYPES[entry.dtype] for name, entry in case.weights.entries.items()}
    path = work.folder / "model.safetensors"
    with disk(work.folder):
        _save(model, path, dtypes)
    again = fresh(case.make, open_weights(path), "auto", case.device)
    x = case.sets.test.batch(range(min(8, len(case.sets.test))), case.device)[0]
    with torch.no_grad():
        outcome.verified = difference(answer(again(x)), answer(model(x)))
    if not outcome.verified <= TOLERANCE:
        raise SecateurError(
            f"a fresh module with the written weights answers differently, by {outcome.verified:.2g} of the largest "
            "output: "
            f"it depends on something that is not in its state dict. All that was done is in {work.folder}."
        )
    there = _there(model, case)
    outcome.layers = {name: 1 - float(keep.float().mean()) for name, keep in there.keep.items()}
    with disk(work.folder):
        (work.folder / "secateur.json").write_text(json.dumps(outcome.as_dict(), indent=2), encoding="utf-8")
        pages.rounds(outcome, work.folder, case)
        logs = work.folder / "logs"
        logs.mkdir(exist_ok=True)
        for log in sorted(work.folder.glob(f"round-*/{LOG}")):
            shutil.copyfile(log, logs / f"{log.parent.name}.jsonl")
        for events in sorted(work.folder.glob(f"round-*/{EVENTS}")):
            (logs / events.parent.name).mkdir(exist_ok=True)
            shutil.copy(events, logs / events.parent.name)
        os.replace(work.folder, out)  # it is whole now; what follows only tidies up
        for folder in out.glob("round-*"):
            shutil.rmtree(folder)
        for left in (*out.glob("best-*.safetensors"), out / STATE, out / LOCK):
            left.unlink(missing_ok=True)


def _example(case: Case) -> torch.Tensor:
    return case.sets.test.batch(range(1), case.device)[0]
