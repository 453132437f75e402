"""Whole units in training: channels, neurons and heads whose weights are held at zero, and removed when it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.structure.apply import apply_
from secateur.structure.budget import Costs
from secateur.structure.couplings import trace
from secateur.structure.criteria import importance
from secateur.structure.planning import asked_of, part_of, plan
from secateur.structure.plans import Plan
from secateur.structure.running import Inputs
from secateur.structure.selection import LEAST, by_budget, by_ratio, candidates
from secateur.structure.surgery import cut_of, dead_of
from secateur.training.schedules import Schedule
from secateur.weights.gradients import Loss


class Structures:
    """What a `Pruner` takes in place of a recipe: units that go along a schedule, through every tensor that they couple.

    model: unwrapped, as it will be trained. example_inputs: what it is traced on. remove or target: see
    `secateur.structure.plan`, such as {"channels": 0.5}, or target={"macs": 0.5}. criterion, batches, loss: see
    `secateur.structure.importance`. Units go by their scores at each choice; those that were gone have lost their weights
    and go first. When training is done, `finish_` cuts the shapes.

    Raises SecateurError where a norm, mean or maximum runs over the units: a mask is not what the cut model computes then.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Inputs,
        *,
        remove: Mapping[str, float] | None = None,
        target: Mapping[str, float] | None = None,
        criterion: str = "magnitude",
        batches: Sequence[Any] = (),
        loss: Loss | None = None,
        allocation: str = "uniform",
        include: Sequence[str] = (),
        protect: Sequence[str] = (),
        multiple: int | None = None,
        least: float = LEAST,
        seed: int = 0,
    ) -> None:
        # a plan of it all shows now whatever cannot be done, and is not used
        request: dict[str, Any] = {"remove": remove, "target": target, "criterion": criterion, "batches": batches}
        request |= {"loss": loss, "allocation": allocation, "include": include, "protect": protect}
        request |= {"multiple": multiple, "least": least, "seed": seed}
        self._couplings = trace(model, example_inputs)
        plan(self._couplings, **request)
        self._asked = asked_of(self._couplings, remove, include, protect)
        if inexact := [c.name for c in self._asked if not c.exact]:
            raise SecateurError(
                f"a norm, mean or maximum runs over the units of {inexact[0]}: with them at zero the model computes "
                "something "
                "else than without them. Remove them in one step (secateur.structure.plan), and train afterwards."
            )
        self._request, self._costs = request, Costs(self._couplings)
        self.units: dict[str, list[int]] = {}  # that are gone now, by coupling
        self.finished = False  # whether the shapes were cut

    @property
    def asked(self) -> dict[str, Any]:
        """What decides which units go, for JSON."""
        given = {key: value for key, value in self._request.items() if key not in ("batches", "loss")}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that lose something."""
        return {part.parameter for coupling in self._asked for part in coupling.slices}

    def masks(self, schedule: Schedule, progress: float) -> dict[str, Tensor]:
        """Keep masks by parameter, as far as a schedule has come."""
        model, request = self._couplings.model, self._request
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            raise SecateurError("units are chosen from whole parameters: use DistributedDataParallel, not fully_shard")
        how = {name: request[name] for name in ("batches", "loss", "seed")}
        scores = importance(self._asked, request["criterion"], **how)
        share = schedule(progress, 1.0 - TINY) if progress < 1 else 1.0
        numbers = {coupling.name: number for number, coupling in enumerate(self._couplings)}
        able = candidates(
            self._couplings, scores, request["multiple"], 0.0 if request["target"] is None else request["least"]
        )
        if request["remove"] is not None:
            parts = {key: _part(value, share) for key, value in request["remove"].items()}
            removed = by_ratio(able, parts)
        else:
            part = part_of(self._costs, request["target"] or {}, share)
            removed = by_budget(self._couplings, self._costs, able, part, request["allocation"])
        self.units = {name: sorted(map(int, removed[n])) for name, n in numbers.items() if n in removed}
        dead = dead_of(self._couplings.facts, [(self._couplings[n], units) for n, units in removed.items()])
        kept = cut_of(self._couplings.facts, dead).kept
        return {name: _mask(p, kept.get(name, {})) for name, p in model.named_parameters() if name in self.parameters}

    def finish_(self) -> Plan:
        """Cut the shapes of what is held at zero, proven on the model as it now is. Nothing is held after that; further
        training takes a new optimizer.

        Raises SecateurError when nothing is gone, or the cut model does not compute what the masked one does.
        """
        if not self.units:
            raise SecateurError("nothing is held at zero yet: train with a Pruner of these structures first")
        found = trace(self._couplings.model, self._couplings.inputs)
        made = plan(found, units=self.units)
        apply_(self._couplings.model, made)
        self.finished = True
        return made


TINY = 1e-9  # `iterative` never reaches all of it


def _part(value: float, share: float) -> float:
    """Of a share, or of a number of units, of which at least one counts as a number."""
    part = value * share
    return part if value < 1 or part >= 1 else 0.0


def _mask(parameter: Tensor, kept: Mapping[int, Any]) -> Tensor:
    keep = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
    for dim, indices in kept.items():
        alive = torch.zeros(parameter.shape[dim], dtype=torch.bool, device=parameter.device)
        alive[torch.from_numpy(indices).to(parameter.device)] = True
        keep &= alive.view([-1 if d == dim else 1 for d in range(parameter.ndim)])
    return keep
