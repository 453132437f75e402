"""Prune while a model trains: a hook on its optimizer chooses masks by a schedule, and holds them at every step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from secateur.errors import SecateurError
from secateur.plan import Setting, make_plan
from secateur.recipe import Recipe, Training, nearest
from secateur.state import read_state, under, write_state
from secateur.training.calibrated import chooser
from secateur.training.masks import Masks, named, placed, whole
from secateur.training.methods import METHODS, Method, gradual
from secateur.training.moment import Keeps, Live, Moment, by_parameter, live
from secateur.training.schedules import SCHEDULES
from secateur.training.structures import Structures
from secateur.weights.gradients import Loss

REFRESHES = 50  # times that masks are chosen, unless `every` says otherwise
CALIBRATED = frozenset({"squares", "gram", "curvature"})  # statistics that no training step has


@dataclass(frozen=True)
class Refresh:
    """One choice of masks. changed: weights that came or went."""

    step: int
    sparsity: float
    changed: int


@dataclass(frozen=True)
class TrainingReport:
    """Where training stands. layers: sparsity of each; violations: weights that are there and should not be."""

    step: int
    total_steps: int
    sparsity: float
    layers: Mapping[str, float]
    violations: int
    refreshes: tuple[Refresh, ...]
    seconds: Mapping[str, float]


class Pruner:
    """Masks that follow a schedule and hold.

    model: as it is trained, wrapped or not. recipe: what to prune and how far, or `Structures` for whole units. optimizer:
    any of torch's kind; accelerate's is looked into. total_steps: of the optimizer. method: see METHODS. schedule: see
    SCHEDULES; by default the method's. start, end: shares of the steps between which masks change; every: steps from one
    choice to the next. What is not given here is what the recipe says under `training`, or else gradual, from 0 to 0.75.
    masks: to begin with, such as those of a pruned checkpoint (`Masks.of_zeros`). data, loss: calibration batches, and
    loss(model, batch), for criteria that read what no training step has (wanda, ria, obs, obd), and for taylor and fisher
    instead of the gradient of the last step. resume: a file that `save` wrote, for a model whose weights were loaded
    already: masks chosen at step 0 would take from them.

    Raises SecateurError where that makes no sense.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe | Structures,
        optimizer: Any,
        total_steps: int,
        *,
        method: str | None = None,
        schedule: str | None = None,
        start: float | None = None,
        end: float | None = None,
        every: int | None = None,
        masks: Masks | None = None,
        data: Iterable[Any] | None = None,
        loss: Loss | None = None,
        resume: str | Path | None = None,
    ) -> None:
        structures = recipe if isinstance(recipe, Structures) else None
        said = (None if isinstance(recipe, Structures) else recipe.training) or Training.model_validate({})
        method, schedule, every = method or said.method, schedule or said.schedule, every or said.every
        start, end = said.start if start is None else start, said.end if end is None else end
        if method not in METHODS:
            raise SecateurError(
                f"unknown training method {method!r}{nearest(method, METHODS)}; known: {', '.join(METHODS)}"
            )
        self._method = METHODS[method]
        schedule = schedule or self._method.schedule
        if schedule not in SCHEDULES:
            raise SecateurError(
                f"unknown schedule {schedule!r}{nearest(schedule, SCHEDULES)}; known: {', '.join(SCHEDULES)}"
            )
        _check_steps(total_steps, start, end, every)
        self.model, self.recipe, self.total_steps = model, recipe, total_steps
        self._schedule = SCHEDULES[schedule]
        self._structures = structures
        self._plan = None if isinstance(recipe, Structures) else make_plan(_inner(model), recipe)
        needs = frozenset() if self._plan is None else self._plan.needs
        self._calibrated = None
        if self._plan is None:
            _check_structures(method, self._method)
        else:
            _check_recipe(self._plan.recipe, needs, data)
            if data is not None and (needs or self._plan.recipe.allocation == "owl"):
                self._calibrated = chooser(_inner(model), self._plan, data, loss)
        self._first, self._last = round(start * total_steps), max(round(end * total_steps), round(start * total_steps))
        if needs & {"gradient", "fisher"} and self._calibrated is None:
            self._first, self._last = max(self._first, 1), max(self._last, 1)  # there is no gradient before
        self._every = every or max(1, (self._last - self._first) // REFRESHES)
        self.masks = masks or Masks({})
        self._memory: dict[str, dict[str, Tensor]] = {s.layer.name: {} for s in self._settings}
        self.step = 0
        self._chosen = 0
        self._refreshes: list[Refresh] = []
        self._seconds = {"hold": 0.0, "choose": 0.0}
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._others: list[Any] = []
        self.attach(optimizer)
        self._watch_others()
        if resume is not None:
            self.load(resume)
        elif self._due():
            self._choose(None)
        self._hold()

    # Hooks

    def attach(self, optimizer: Any) -> None:
        """Hook an optimizer, another one too. Raises SecateurError when it has none of the masked parameters."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if not self._has_ours(optimizer):
            raise SecateurError(
                f"the {type(optimizer).__name__} updates none of the parameters that are to be pruned: make it of "
                "model.parameters(), after the model was wrapped and moved"
            )
        optimizer.register_step_post_hook(self._after_step)
        self._optimizers.append(weakref.ref(optimizer))

    def also(self, model: nn.Module) -> None:
        """Hold the masks in another model of the same names, too: a moving average of the weights."""
        self._others.append(model)
        self._hold()

    def _watch_others(self) -> None:
        """An optimizer that was made later, or copied, and has our parameters is hooked when it steps first."""
        mine = weakref.ref(self)

        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            pruner = mine()
            if pruner is not None and pruner._is_new(optimizer) and pruner._has_ours(optimizer):
                pruner.attach(optimizer)
                pruner._after_step(optimizer, args, kwargs)

        weakref.finalize(self, register_optimizer_step_post_hook(stepped).remove)

    def _is_new(self, optimizer: Optimizer) -> bool:
        return all(known() is not optimizer for known in self._optimizers)

    @property
    def _settings(self) -> Sequence[Setting]:
        return () if self._plan is None else self._plan.settings

    def _has_ours(self, optimizer: Optimizer) -> bool:
        wanted = {s.layer.parameter for s in self._settings}
        if self._structures is not None:
            wanted = self._structures.parameters
        ours = {id(parameter) for name, parameter in named(self.model) if name in wanted}
        return any(id(p) in ours for group in optimizer.param_groups for p in group["params"])

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _skipped(optimizer):
            return
        started = time.perf_counter()
        self.step += 1
        if self._method.watch is not None:
            self._method.watch(self._live(), float(optimizer.param_groups[0]["lr"]))
        if self._due():
            self._hold()  # what is masked took part in the step, and must not be taken for what is there
            self._choose(optimizer)
            self._seconds["choose"] += time.perf_counter() - started
            started = time.perf_counter()
        self._hold()
        self._seconds["hold"] += time.perf_counter() - started

    def _hold(self) -> None:
        for model in (self.model, *self._others):
            self.masks.apply_(model)

    # Masks

    def _due(self) -> bool:
        """At the beginning, every so many steps after it, and at the end."""
        within = self._first <= self.step <= self._last
        return within and ((self.step - self._first) % self._every == 0 or self.step == self._last)

    def _choose(self, optimizer: Optimizer | None) -> None:
        length = max(self._last - self._first, 1)
        progress = 1.0 if self._last == self._first else (self.step - self._first) / length
        if self._structures is not None:
            keep = self._structures.masks(self._schedule, progress)
            grown = {name: mask & ~self.masks.keep.get(name, torch.ones_like(mask)) for name, mask in keep.items()}
            gone = {name: ~mask & self.masks.keep.get(name, torch.ones_like(mask)) for name, mask in keep.items()}
            changed = sum(int(mask.sum()) for mask in (*grown.values(), *gone.values()))
        else:
            keep, grown, changed = self._by_method(progress)
        with torch.no_grad():
            self.masks = Masks(self.masks.keep | keep)
            if optimizer is not None:
                _fresh(self.model, optimizer, grown)
        _check_ranks(self.masks)
        self._chosen += 1
        self._refreshes.append(Refresh(self.step, self.masks.sparsity, changed))

    def _by_method(self, progress: float) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """By parameter: what stays, and what comes; and how many weights came or went."""
        assert self._plan is not None
        layers = self._live()
        moment = Moment(self._plan, layers, self._schedule, progress, self._chosen, self._calibrated)
        with torch.no_grad():
            keeps = self._method.choose(moment)
            changed = sum(int((keeps[layer.name] != layer.keep).sum()) for layer in layers)
            grown = {layer.name: keeps[layer.name] & ~layer.keep for layer in layers}
            self._restore(layers, grown)
            return by_parameter(self.model, layers, keeps), by_parameter(self.model, layers, grown), changed

    def _restore(self, layers: list[Live], grown: Keeps) -> None:
        """What comes back has the value that the method remembers of it."""
        parameters = dict(named(self.model))
        for layer in layers:
            if "weight" in layer.memory and bool(grown[layer.name].any()):
                parameter = parameters[layer.setting.layer.parameter]
                full = whole(parameter.detach()).clone()
                new = torch.where(grown[layer.name], layer.memory["weight"], layer.weight)
                layer.setting.layer.write_(full, new)
                parameter.copy_(placed(full, parameter))

    def _live(self) -> list[Live]:
        return [] if self._plan is None else live(self.model, self._plan, self.masks, self._memory)

    # What was reached, and going on with it

    def report(self) -> TrainingReport:
        """Where training stands."""
        keeps = {x.name: x.keep for x in self._live()} if self._structures is None else self.masks.keep
        total = sum(keep.numel() for keep in keeps.values())
        return TrainingReport(
            self.step,
            self.total_steps,
            1 - sum(int(keep.sum()) for keep in keeps.values()) / total if total else 0.0,
            {name: 1 - float(keep.float().mean()) for name, keep in keeps.items()},
            sum(self.masks.violations(model) for model in (self.model, *self._others)),
            tuple(self._refreshes),
            dict(self._seconds),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that going on needs besides the states of model and optimizer: tensors and numbers alone."""
        memory = {f"{layer}/{key}": value for layer, own in self._memory.items() for key, value in own.items()}
        refreshes = [(r.step, r.sparsity, r.changed) for r in self._refreshes]
        return {
            "step": self.step,
            "chosen": self._chosen,
            "masks": self.masks.state_dict(),
            "memory": memory,
            "refreshes": refreshes,
            **({} if self._structures is None else {"units": self._structures.units}),
        }

    def save(self, path: str | Path) -> None:
        """Write `state_dict` to a safetensors file, whole or not at all."""
        state, path = self.state_dict(), Path(path)
        tensors = {f"masks/{name}": bits for name, bits in state.pop("masks").items()}
        tensors |= {f"memory/{name}": value for name, value in state.pop("memory").items()}
        write_state(path, tensors, state)

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote. Raises SecateurError when it is none, or another model's."""
        tensors, state = read_state(Path(path), "holds no masks of a training run")
        self.load_state_dict(state | {part: under(tensors, f"{part}/") for part in ("masks", "memory")})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises SecateurError when it is another model's."""
        self.masks = Masks.from_state_dict(state["masks"], self.model)
        self.step, self._chosen = int(state["step"]), int(state["chosen"])
        self._refreshes = [Refresh(*values) for values in state["refreshes"]]
        if self._structures is not None:
            self._structures.units = state["units"]
        self._memory = {name: {} for name in self._memory}
        devices = {name: parameter.device for name, parameter in named(self.model)}
        places = {s.layer.name: devices[s.layer.parameter] for s in self._settings}
        for key, value in state["memory"].items():
            layer, _, what = key.rpartition("/")
            self._memory[layer][what] = value.to(places[layer], copy=True)
        self._hold()


def _skipped(optimizer: Optimizer) -> bool:
    """Whether a scaler found an infinity: a fused optimizer is called all the same, and does nothing."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _inner(model: nn.Module) -> nn.Module:
    """The module inside of what torch.compile and DistributedDataParallel make."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _check_steps(total_steps: int, start: float, end: float, every: int | None) -> None:
    if total_steps < 1:
        raise SecateurError(f"total_steps is {total_steps}; expected how often the optimizer will step")
    if not 0 <= start <= end <= 1:
        raise SecateurError(f"start {start} and end {end}: expected shares of the steps, 0 <= start <= end <= 1")
    if every is not None and every < 1:
        raise SecateurError(f"every is {every}; expected 1 step or more")


def _check_structures(name: str, method: Method) -> None:
    if method.choose is not gradual:
        raise SecateurError(f"whole units go gradually or in turns (ac-dc); the method {name} is for single weights")


def _check_recipe(recipe: Recipe, needs: frozenset[str], data: Any) -> None:
    if recipe.update != "none":
        raise SecateurError(
            f"the update {recipe.update} changes the weights that stay, which training does here: use the update none, "
            'such as secateur.method("magnitude", sparsity=0.9)'
        )
    if data is None and (needs & CALIBRATED or recipe.allocation == "owl"):
        raise SecateurError(
            f"the criterion {recipe.criterion} with the allocation {recipe.allocation} reads what no training step has: "
            "give calibration batches (data=...), or use magnitude, taylor, fisher or random"
        )


def _check_ranks(masks: Masks) -> None:
    """Raises SecateurError when the ranks of a process group have chosen different masks."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, masks.digest())
    if len(set(found)) > 1:
        raise SecateurError(
            f"the ranks have chosen different masks ({', '.join(found)}): their weights or gradients differ.\n"
            "  Wrap the model in DistributedDataParallel or fully_shard before the pruner is made, with one seed for all."
        )


def _fresh(model: nn.Module, optimizer: Optimizer, grown: Mapping[str, Tensor]) -> None:
    """Weights that come have no momentum; their second moments are the layer's median, since with zero Adam's first step
    would be several times its learning rate.
    """
    for name, parameter in named(model):
        new = grown.get(name)
        state = optimizer.state.get(parameter, {})
        if new is None or not state or not bool(new.any()):
            continue
        there = placed(new, parameter)
        for key in ("momentum_buffer", "exp_avg"):
            if isinstance(state.get(key), Tensor):
                state[key].mul_(~there)
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            if isinstance(state.get(key), Tensor):
                state[key].mul_(~there).add_(there, alpha=float(whole(state[key]).median()))
