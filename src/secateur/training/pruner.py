"""Prune while a model trains: a hook on its optimizer chooses masks by a schedule, and holds them at every step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from secateur.errors import SecateurError
from secateur.plan import Plan, Setting, make_plan
from secateur.recipe import Recipe, Training
from secateur.state import disk, read_state, under, write_state
from secateur.training.calibrated import chooser
from secateur.training.checks import (
    check_model,
    check_ranks,
    check_recipe,
    check_steps,
    check_structures,
    check_turns,
    check_words,
)
from secateur.training.masks import Masks, named, placed, plain, whole
from secateur.training.methods import METHODS
from secateur.training.moment import Keeps, Live, Moment, by_parameter, check_reachable, deviations, live
from secateur.training.optimizers import fresh_, parameters, rates, skipped
from secateur.training.schedules import SCHEDULES, TURNS
from secateur.training.structures import Structures
from secateur.weights.gradients import Loss

REFRESHES = 50  # times that masks are chosen, unless `every` says otherwise
PARTS = ("masks", "given", "memory")  # of the state, that are tensors
CHOOSING = {"criterion", "granularity", "sparsity", "threshold", "allocation", "overrides", "seed"}  # of a recipe


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
    masks: to begin with, such as those of a pruned checkpoint (`Masks.of_zeros`): set and rigl go on from them, static
    holds them, and under the other methods what they have removed never comes back. data, loss: calibration batches, and
    loss(model, batch), for criteria that read what no training step has (wanda, ria, obs, obd), and for taylor and fisher
    instead of the gradient of the last step. resume: a file that `save` wrote, for a model whose weights were loaded
    already: masks chosen at step 0 would take from them.

    A pruner holds until `detach`, until another one is made for the same parameters, or until structures are cut. Where
    several optimizers have a part of the parameters each, a step is one of the optimizer that was given.

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
        method, schedule, every = (
            method or said.method,
            schedule or said.schedule,
            said.every if every is None else every,
        )
        start, end = said.start if start is None else start, said.end if end is None else end
        check_words(method, schedule)
        check_steps(total_steps, start, end, every)
        check_model(model, masks)
        self._method = METHODS[method]
        schedule = schedule or self._method.schedule
        self.model, self.recipe, self.total_steps = model, recipe, total_steps
        self._schedule = SCHEDULES[schedule]
        self._structures = structures
        self._plan = None if isinstance(recipe, Structures) else _planned(model, recipe)
        needs = frozenset() if self._plan is None else self._plan.needs
        self._calibrated = None
        if structures is not None:
            check_structures(structures, method, self._method)
        elif self._plan is not None:
            check_recipe(self._plan, method, model, data)
            if data is not None and (needs or self._plan.recipe.allocation == "owl"):
                self._calibrated = chooser(_inner(model), self._plan, data, loss)
        self._first, self._last = round(start * total_steps), max(round(end * total_steps), round(start * total_steps))
        if needs & {"gradient", "fisher"} and self._calibrated is None:
            self._first, self._last = max(self._first, 1), max(self._last, 1)  # there is no gradient before
        self._every = every or max(1, (self._last - self._first) // REFRESHES)
        check_turns(schedule, self._last - self._first, self._every)
        self._way = {"method": method, "schedule": schedule, "total_steps": total_steps, "every": self._every}
        self._way |= {"first": self._first, "last": self._last}
        asked = recipe.model_dump(mode="json", include=CHOOSING) if isinstance(recipe, Recipe) else recipe.asked
        self._way |= asked
        self.masks = (masks or Masks({})).beside(model)
        self._given = self.masks
        remembered = [s.layer.name for s in self._settings] if structures is None else structures.parameters
        self._memory: dict[str, dict[str, Tensor]] = {name: {} for name in remembered}
        self._deviations = {} if self._plan is None else deviations(model, self._plan)
        self.step = 0
        self._chosen = 0
        self._refreshes: list[Refresh] = []
        self._seconds = {"hold": 0.0, "choose": 0.0}
        self._optimizers: list[tuple[weakref.ref[Optimizer], Any]] = []  # with the handle of our hook
        self._lead: weakref.ref[Optimizer] | None = None
        self._others: list[nn.Module] = []
        if self._plan is not None and self._calibrated is None:
            check_reachable(self._plan, self._live(), self._schedule)
        replaced = self._replaced()
        self.attach(optimizer)
        self._watch_others()
        if self._method.watch is not None:
            self._method.watch([replace(layer, gradient=None) for layer in self._live()])
        try:
            if resume is not None:
                self.load(resume)
            elif self._due():
                self._choose()
            self._hold()
        except BaseException:
            self.detach()  # nobody has this pruner, and it must not choose any masks
            raise
        for other in replaced:
            other.detach()
        _ACTIVE.add(self)

    # Hooks

    def _replaced(self) -> list[Pruner]:
        """Those that hold what this one will. Raises SecateurError where one holds more, which nobody would hold then."""
        own = self._wanted()
        found = [other for other in _ACTIVE if other._held_in() and own & other._wanted()]
        for other in found:
            if more := other._wanted() - own:
                names = {id(parameter): name for name, parameter in named(other.model)}
                both = min(names[i] for i in own & other._wanted())
                raise SecateurError(
                    f"another pruner holds {both}, too, and {min(names[i] for i in more)} besides: call its detach() "
                    "first, or protect in one of the two recipes what the other prunes"
                )
        return found

    def attach(self, optimizer: Any) -> None:
        """Hook an optimizer, another one too. Raises SecateurError when it has none of the masked parameters."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if not self._has_ours(optimizer):
            raise SecateurError(
                f"the {type(optimizer).__name__} updates none of the parameters that are to be pruned: make it of "
                "model.parameters(), after the model was wrapped and moved"
            )
        handle = optimizer.register_step_post_hook(self._after_step)
        self._optimizers.append((weakref.ref(optimizer), handle))
        lead = None if self._lead is None else self._lead()
        if lead is None or parameters(lead) & parameters(optimizer):  # the first, or one in its place
            self._lead = weakref.ref(optimizer)

    def detach(self) -> None:
        """Hold nothing any more, and hook no optimizer. What was reached can still be asked for."""
        for _, handle in self._optimizers:
            handle.remove()
        self._optimizers.clear()
        self._unwatch()
        _ACTIVE.discard(self)

    def also(self, model: nn.Module) -> None:
        """Hold the masks in another model of the same names, too: a moving average of the weights.

        Raises SecateurError when it has other names or shapes.
        """
        shapes, wanted = {name: p.shape for name, p in named(model)}, self._wanted()
        own = {name: p.shape for name, p in named(self.model) if id(p) in wanted}
        if other := next((name for name in own if shapes.get(name) != own[name]), None):
            raise SecateurError(
                f"{type(model).__name__} has no {other} {list(own[other])} to hold masks in: give a copy or an average of "
                "the model that is pruned (of ddp.module, where it was wrapped)"
            )
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

        self._unwatch = weakref.finalize(self, register_optimizer_step_post_hook(stepped).remove)

    def _is_new(self, optimizer: Optimizer) -> bool:
        return all(known() is not optimizer for known, _ in self._optimizers)

    @property
    def _settings(self) -> Sequence[Setting]:
        return () if self._plan is None else self._plan.settings

    def _has_ours(self, optimizer: Optimizer) -> bool:
        return bool(self._wanted() & parameters(optimizer))

    def _wanted(self) -> set[int]:
        """The ids of what is pruned."""
        wanted = {s.layer.parameter for s in self._settings}
        if self._structures is not None:
            wanted = self._structures.parameters
        return {id(parameter) for name, parameter in named(self.model) if name in wanted}

    def _alive(self) -> list[Optimizer]:
        return [optimizer for known, _ in self._optimizers if (optimizer := known()) is not None]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if skipped(optimizer) or not self._held_in():
            return
        started = time.perf_counter()
        leads = self._lead is not None and self._lead() is optimizer
        self.step += leads
        if leads and self._method.watch is not None:
            self._method.watch(self._live(rates(self.model, self._alive())))
        if leads and self._due():
            self._hold()  # what is masked took part in the step, and must not be taken for what is there
            self._choose()
            self._seconds["choose"] += time.perf_counter() - started
            started = time.perf_counter()
        self._hold()
        self._seconds["hold"] += time.perf_counter() - started

    def _hold(self) -> None:
        for model in self._held_in():
            self.masks.apply_(model)

    def _held_in(self) -> tuple[nn.Module, ...]:
        """Models that masks are held in; none once their units were cut away."""
        return () if self._structures is not None and self._structures.finished else (self.model, *self._others)

    # Masks

    def _due(self) -> bool:
        """At the beginning, every so many steps after it, and at the end."""
        within = self._first <= self.step <= self._last
        return within and ((self.step - self._first) % self._every == 0 or self.step == self._last)

    def _choose(self) -> None:
        length = max(self._last - self._first, 1)
        progress = 1.0 if self._last == self._first else (self.step - self._first) / length
        keep, grown, changed = self._by_method(progress) if self._structures is None else self._by_units(progress)
        self.masks = Masks(self.masks.keep | keep)
        fresh_(self.model, self._alive(), grown)
        check_ranks(self.masks)
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

    def _by_units(self, progress: float) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """The same, of structures."""
        assert self._structures is not None
        keep = self._structures.masks(self._schedule, progress)
        before = {name: self.masks.keep.get(name, torch.ones_like(mask)) for name, mask in keep.items()}
        gone = {name: ~mask & before[name] for name, mask in keep.items()}
        grown = {name: mask & ~before[name] for name, mask in keep.items()}
        if self._way["schedule"] in TURNS:
            self._exchange(gone, grown)
        return keep, grown, sum(int(mask.sum()) for mask in (*gone.values(), *grown.values()))

    @torch.no_grad()
    def _exchange(self, gone: Mapping[str, Tensor], grown: Mapping[str, Tensor]) -> None:
        """Units come back with the weights that they had when they went: all at zero, they would have no gradient."""
        for name, parameter in named(self.model):
            if name in gone:
                memory = self._memory[name].setdefault("weight", parameter.detach().clone())
                memory.copy_(torch.where(gone[name], parameter, memory))
                parameter.copy_(torch.where(grown[name], memory, parameter))

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

    def _live(self, rates: Mapping[str, float] | None = None) -> list[Live]:
        if self._plan is None:
            return []
        more = {"given": self._given if self._given.keep else None, "memory": self._memory, "rates": rates}
        return live(self.model, self._plan, self.masks, self._deviations, **more)

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
            sum(self.masks.violations(model) for model in self._held_in()),
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
            "way": self._way,
            "masks": self.masks.state_dict(),
            "given": self._given.state_dict(),
            "memory": memory,
            "deviations": self._deviations,
            "refreshes": refreshes,
            **({} if self._structures is None else {"units": self._structures.units}),
        }

    def save(self, path: str | Path) -> None:
        """Write `state_dict` to a safetensors file, whole or not at all. Raises SecateurError when that cannot be."""
        state, path = self.state_dict(), Path(path)
        tensors = {f"{part}/{name}": value for part in PARTS for name, value in state.pop(part).items()}
        with disk(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_state(path, tensors, state)

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote. Raises SecateurError when it is none, or another model's."""
        tensors, state = read_state(Path(path), "holds no masks of a training run")
        self.load_state_dict(state | {part: under(tensors, f"{part}/") for part in PARTS})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises SecateurError when it is another model's, or another training's."""
        self._check_state(state)
        self.masks = Masks.from_state_dict(state["masks"], self.model)
        self._given = Masks.from_state_dict(state["given"], self.model)
        self._deviations = dict(state["deviations"])
        self.step, self._chosen = int(state["step"]), int(state["chosen"])
        self._refreshes = [Refresh(*values) for values in state["refreshes"]]
        if self._structures is not None:
            self._structures.units = state["units"]
        self._memory = {name: {} for name in self._memory}
        devices = {name: parameter.device for name, parameter in named(self.model)}
        places = devices | {s.layer.name: devices[s.layer.parameter] for s in self._settings}
        for key, value in state["memory"].items():
            layer, _, what = key.rpartition("/")
            self._memory[layer][what] = value.to(places[layer], copy=True)
        self._hold()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raises SecateurError when this training cannot go on from it."""
        keys = {"way", "deviations", "step", "chosen", "refreshes", *PARTS}
        keys |= {"units"} if self._structures is not None else set()
        if missing := keys - set(state):
            raise SecateurError(f"the state holds no masks of such a training run: there is no {min(missing)!r} in it")
        for name, value in self._way.items():
            if state["way"].get(name) != value:
                raise SecateurError(
                    f"the masks are another training's: {name} was {state['way'].get(name)}, here it is {value}.\n"
                    "  Make the pruner as it was made there; total_steps counts from the beginning."
                )
        if set(state["deviations"]) != set(self._deviations):
            other = min(set(state["deviations"]) ^ set(self._deviations))
            raise SecateurError(f"the masks are another recipe's: {other} is pruned in one of them alone")


def _inner(model: nn.Module) -> nn.Module:
    """The module inside of what torch.compile, DistributedDataParallel and DataParallel make."""
    around = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while (inside := getattr(model, "_orig_mod", model.module if isinstance(model, around) else model)) is not model:
        model = inside
    return model


def _planned(model: nn.Module, recipe: Recipe) -> Plan:
    """The plan, in the plain names that masks go by."""
    made = make_plan(_inner(model), recipe)
    settings = []
    for setting in made.settings:
        layer = setting.layer
        layer = replace(layer, name=plain(layer.name), parameter=plain(layer.parameter))
        settings.append(replace(setting, layer=layer))
    return replace(made, settings=settings)


_ACTIVE: weakref.WeakSet[Pruner] = weakref.WeakSet()
