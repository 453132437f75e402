"""Fine-tuning: one small loop, with a log, checkpoints that a killed run goes on from, and the dense model as a teacher
where wanted. A loop of the user's own does as well: nothing else here depends on it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.data import call
from secateur.errors import SecateurError
from secateur.measure.classify import check_labels
from secateur.probe import answer
from secateur.state import disk, read_state, under, write_state

CHECKPOINT, LOG, EVENTS = "checkpoint.safetensors", "log.jsonl", "events.out.tfevents.*"


class Batches(Protocol):
    """Steps of an epoch, and the (inputs, labels) of one by its number, such as `secateur.data.images.Epochs`."""

    def __len__(self) -> int: ...
    def epoch(self, number: int) -> Iterable[Any]: ...


class Loader(Protocol):
    """Steps of an epoch, and (inputs, labels) anew each time, such as torch's DataLoader."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class Held(Protocol):
    """What holds masks during training: a `secateur.training.Pruner`."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Diverged(SecateurError):
    """The loss of a training is no number any more."""


class Settings(BaseModel):
    """How to train. lr: the peak; warmup: share of the steps until it is reached; after that decay to 0.

    distil: the weight of the teacher's part in the loss, in 0..1; temperature: of its softmax. batch, augment: for those
    who make batches of it. precision: bfloat16 computes in it and keeps weights as they are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: int = Field(5, ge=1)
    lr: float = Field(0.02, gt=0)
    batch: int = Field(128, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.0, ge=0, lt=1)
    augment: tuple[str, ...] = ()
    distil: float = Field(0.0, ge=0, le=1)
    temperature: float = Field(2.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to. loss: mean over its steps; sparsity: of what is held, where there is something; measures: of
    `evaluate`, where it was given.
    """

    number: int
    loss: float
    lr: float
    seconds: float
    sparsity: float | None
    measures: Mapping[str, float]


Prune = Callable[[nn.Module, Optimizer, int], Held]  # model, optimizer, steps of the whole training -> what holds masks
Evaluate = Callable[[nn.Module], Mapping[str, float]]
Progress = Callable[[str, int, int, str], None]


@dataclass
class _Run:
    """A training that is under way."""

    model: nn.Module
    optimizer: Optimizer
    held: Held | None
    settings: Settings
    steps: int  # of an epoch
    folder: Path | None
    history: list[Epoch]
    first: int = 0  # epoch of this process


def finetune_(
    model: nn.Module,
    batches: Batches | Loader,
    settings: Settings | None = None,
    *,
    prune: Prune | None = None,
    teacher: nn.Module | None = None,
    evaluate: Evaluate | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> list[Epoch]:
    """Train a classifier in place; returns what every epoch came to.

    batches: (inputs, labels [n]) or mappings with `labels`; a DataLoader does. prune: makes what holds masks, such as
    lambda model, optimizer, steps: Pruner(model, recipe, optimizer, steps). teacher: the dense model, asked where
    settings.distil is above 0; the loss is (1 - distil) CE + distil T^2 KL(teacher || model) (Hinton et al. 2015,
    arXiv:1503.02531). evaluate: after each epoch, in eval mode. folder: gets log.jsonl, and after each epoch a checkpoint
    that replaces the one before; resume: go on from it, to the last bit. tensorboard: events there, too.

    Raises SecateurError when the loss is no number, labels are out of range (-100 is), the checkpoint is another model's,
    or the disk is full; the last checkpoint is whole then.
    """
    settings = settings or Settings.model_validate({})
    if settings.distil and teacher is None:
        raise SecateurError("distil is above 0 and there is no teacher: give the dense model, or set distil to 0")
    if teacher is not None:
        teacher.eval()
    where = None if folder is None else Path(folder)
    if tensorboard:
        if where is None:
            raise SecateurError("TensorBoard events need a folder to go to")
        check_tensorboard()
    torch.manual_seed(settings.seed)
    steps = len(batches)
    if steps < 1:
        raise SecateurError("an epoch has no steps: no images, or fewer than a batch where the last one is dropped")
    optimizer = optimizer_of(model, settings)
    held = None if prune is None else prune(model, optimizer, settings.epochs * steps)
    run = _Run(model, optimizer, held, settings, steps, where, [])
    if resume and where is not None and (where / CHECKPOINT).exists():
        _load(run, where / CHECKPOINT)
        _write_log(run)  # a run that was killed after its checkpoint has not
    elif where is not None:
        with disk(where):
            where.mkdir(parents=True, exist_ok=True)
            events = where.glob(EVENTS) if tensorboard else ()
            for left in (where / LOG, where / CHECKPOINT, *events):  # of another run, that this one must not go on from
                left.unlink(missing_ok=True)
    writer = _writer(where) if tensorboard and where is not None else None
    run.first = len(run.history)
    try:
        for number in range(len(run.history), settings.epochs):
            run.history.append(_epoch(run, batches, number, teacher, evaluate, progress))
            _write(run, writer)
    finally:
        if writer is not None:
            writer.close()
    if progress is not None:
        progress("train", settings.epochs * steps, settings.epochs * steps, "done")
    model.eval()
    return run.history


def _epoch(
    run: _Run,
    batches: Batches | Loader,
    number: int,
    teacher: nn.Module | None,
    evaluate: Evaluate | None,
    progress: Progress | None,
) -> Epoch:
    started, settings = time.perf_counter(), run.settings
    run.model.train()
    total, done, lr = torch.zeros(()), number * run.steps, settings.lr
    device = next(run.model.parameters()).device
    given: Iterable[Any] = batches.epoch(number) if hasattr(batches, "epoch") else batches  # type: ignore[union-attr]
    for step, batch in enumerate(given):
        lr = rate(settings, (done + step) / (settings.epochs * run.steps))
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        loss = _loss(run, batch, device, teacher, check=number == run.first)
        run.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        try:
            run.optimizer.step()
        except SecateurError:  # masks are chosen there, which takes finite weights
            if all(bool(torch.isfinite(p).all()) for p in run.model.parameters()):
                raise
            _check_finite(torch.tensor(torch.nan), run, number, step)
        total = total.to(loss.device) + loss.detach()
        if step % 16 == 0 or step == run.steps - 1:
            _check_finite(total, run, number, step)
            if progress is not None:
                progress("train", done + step, settings.epochs * run.steps, f"epoch {number + 1}")
    measures = {} if evaluate is None else {key: float(value) for key, value in evaluate(run.model.eval()).items()}
    sparsity = getattr(getattr(run.held, "masks", None), "sparsity", None)
    return Epoch(number, float(total) / max(run.steps, 1), lr, time.perf_counter() - started, sparsity, measures)


def rate(settings: Settings, progress: float) -> float:
    """The learning rate at a progress in 0..1."""
    if progress < settings.warmup:
        return settings.lr * progress / settings.warmup
    rest = (progress - settings.warmup) / (1 - settings.warmup)
    down = {"cosine": (1 + math.cos(math.pi * rest)) / 2, "linear": 1 - rest, "constant": 1.0}
    return settings.lr * down[settings.decay]


def optimizer_of(model: nn.Module, settings: Settings) -> Optimizer:
    """The optimizer that the settings name. Norms and biases do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise SecateurError("no parameter of the model is trained (requires_grad): there is nothing to fine-tune")
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)
    return torch.optim.AdamW(groups, lr=settings.lr)


def _loss(run: _Run, batch: Any, device: torch.device, teacher: nn.Module | None, check: bool) -> Tensor:
    inputs, labels = _apart(batch, device)
    settings = run.settings
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        logits = answer(call(run.model, inputs)).float()
        if check:  # where they are on a GPU, it waits for them
            check_labels(logits, labels)
        loss = F.cross_entropy(logits, labels)
        if teacher is None or not settings.distil:
            return loss
        with torch.no_grad():
            wanted = answer(call(teacher, inputs)).float()
        if wanted.shape != logits.shape:
            raise SecateurError(
                f"the teacher answers {list(wanted.shape)}, the model {list(logits.shape)}: they have other classes"
            )
    t = settings.temperature
    apart = F.kl_div(F.log_softmax(logits / t, 1), F.log_softmax(wanted / t, 1), reduction="batchmean", log_target=True)
    return (1 - settings.distil) * loss + settings.distil * t * t * apart


def _apart(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    """What the model is given, and the labels."""
    if isinstance(batch, Mapping) and "labels" in batch:
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        labels = moved.pop("labels")
        return moved, labels
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[0], Tensor):
        return batch[0].to(device), batch[1].to(device)
    has = f"a mapping of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise SecateurError(f"a batch is {has}; expected (inputs, labels), or a mapping with labels")


def _check_finite(total: Tensor, run: _Run, number: int, step: int) -> None:
    if bool(torch.isfinite(total)):
        return
    kept = "" if run.folder is None or not run.history else f" Epoch {len(run.history)} is kept in {run.folder}."
    raise Diverged(
        f"the loss is {float(total)} in step {step + 1} of epoch {number + 1}: the weights are of no use any more.{kept}\n"
        f"  Lower lr ({run.settings.lr}), warm up (warmup: 0.1), or look at the inputs for NaN."
    )


# Logs and checkpoints


def _write(run: _Run, writer: Any) -> None:
    epoch = run.history[-1]
    if run.folder is not None:
        with disk(run.folder):
            _save(run, run.folder / CHECKPOINT)
        _write_log(run)
    if writer is not None:
        numbers = {"loss": epoch.loss, "lr": epoch.lr, "sparsity": epoch.sparsity} | dict(epoch.measures)
        for name, value in numbers.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, epoch.number + 1)
        writer.flush()


def _write_log(run: _Run) -> None:
    """All of it, whatever an earlier run left; whole, or as it was."""
    assert run.folder is not None
    partial = run.folder / f"{LOG}.partial"
    with disk(run.folder):
        partial.write_text("".join(json.dumps(asdict(each)) + "\n" for each in run.history), encoding="utf-8")
        os.replace(partial, run.folder / LOG)


def _save(run: _Run, path: Path) -> None:
    """Everything that going on needs, in one file that is whole or not there."""
    tensors: dict[str, Tensor] = {f"model/{name}": value for name, value in run.model.state_dict().items()}
    state = run.optimizer.state_dict()["state"]
    tensors |= {
        f"optimizer/{i}/{key}": v for i, own in state.items() for key, v in own.items() if isinstance(v, Tensor)
    }
    tensors |= {f"random/{name}": value for name, value in _random()}
    told: dict[str, Any] = {"history": [asdict(epoch) for epoch in run.history]}
    told |= {"settings": run.settings.model_dump(), "steps": run.steps}
    if run.held is not None:
        told["held"] = {}
        for part, held in run.held.state_dict().items():
            if isinstance(held, Mapping) and held and all(isinstance(value, Tensor) for value in held.values()):
                tensors |= {f"held/{part}/{name}": value for name, value in held.items()}
            else:
                told["held"][part] = held
    write_state(path, tensors, told)


def _random() -> Iterator[tuple[str, Tensor]]:
    yield "cpu", torch.get_rng_state()
    if torch.cuda.is_available():
        yield from ((f"cuda/{i}", value) for i, value in enumerate(torch.cuda.get_rng_state_all()))


def _load(run: _Run, path: Path) -> None:
    tensors, told = read_state(path, "is no checkpoint of fine-tuning")
    try:
        history = [Epoch(**row) for row in told["history"]]
    except (KeyError, TypeError) as error:
        raise SecateurError(f"{path} is no checkpoint of fine-tuning, or an older version's ({error})") from None
    changed = [key for key, value in run.settings.model_dump().items() if _plain(value) != told["settings"].get(key)]
    if changed or told["steps"] != run.steps:
        what = ", ".join(changed) or "the number of steps"
        raise SecateurError(f"{path} was made with other settings ({what}): go on with the same, or begin anew")
    if (run.held is None) != ("held" not in told):
        there, here = ("no masks", "masks") if run.held is not None else ("masks", "none")
        raise SecateurError(f"{path} was made with {there}, and here are {here}: go on with the same, or begin anew")
    weights = under(tensors, "model/")
    own = run.model.state_dict()
    other = [n for n in {*own, *weights} if n not in own or n not in weights or own[n].shape != weights[n].shape]
    if other:
        raise SecateurError(f"{path} is a checkpoint of another model: {sorted(other)[0]} differs")
    run.model.load_state_dict(weights)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in under(tensors, "optimizer/").items():
        number, _, key = name.partition("/")
        state.setdefault(int(number), {})[key] = value
    run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": state})
    if run.held is not None:
        held = under(tensors, "held/")
        parts = {part: under(held, f"{part}/") for part in {name.partition("/")[0] for name in held}}
        run.held.load_state_dict(told["held"] | parts)
    random = under(tensors, "random/")
    torch.set_rng_state(random.pop("cpu"))
    if random and torch.cuda.device_count() == len(random):
        torch.cuda.set_rng_state_all([random[f"cuda/{i}"] for i in range(len(random))])
    run.history.extend(history)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_tensorboard() -> None:
    """Raises SecateurError where no events can be written."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise SecateurError("events need the package tensorboard: pip install 'secateur[tensorboard]'") from None


def _writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    with disk(folder):
        return SummaryWriter(str(folder))
