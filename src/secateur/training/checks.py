"""What a training with masks refuses, before it begins where that can be known."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from secateur.errors import SecateurError
from secateur.plan import Plan
from secateur.recipe import nearest
from secateur.training.masks import Masks, named
from secateur.training.methods import METHODS, Method, gradual
from secateur.training.schedules import SCHEDULES, TURNS
from secateur.training.structures import Structures

CALIBRATED = frozenset({"squares", "gram", "curvature"})  # statistics that no training step has


def check_model(model: nn.Module, masks: Masks | None) -> None:
    """Raises SecateurError when there are no weights yet, or the masks are another model's."""
    shapes = {name: tuple(parameter.shape) for name, parameter in named(model)}
    if any(parameter.is_meta for parameter in model.parameters()):
        raise SecateurError("the model has no weights yet (meta device): load them before the pruner is made")
    for name, mask in (masks.keep if masks is not None else {}).items():
        if shapes.get(name) != tuple(mask.shape):
            has = f"it is {list(shapes[name])}" if name in shapes else "there is no such parameter"
            raise SecateurError(f"the masks are another model's: {name} is {list(mask.shape)}, here {has}")


def check_words(method: str, schedule: str | None) -> None:
    """Raises SecateurError when there is no such method or schedule."""
    for what, word, known in (("training method", method, METHODS), ("schedule", schedule, SCHEDULES)):
        if word is not None and word not in known:
            raise SecateurError(f"unknown {what} {word!r}{nearest(word, known)}; known: {', '.join(known)}")


def check_steps(total_steps: int, start: float, end: float, every: int | None) -> None:
    """Raises SecateurError when they are no part of a training."""
    if total_steps < 1:
        raise SecateurError(f"total_steps is {total_steps}; expected how often the optimizer will step")
    if not 0 <= start <= end <= 1:
        raise SecateurError(f"start {start} and end {end}: expected shares of the steps, 0 <= start <= end <= 1")
    if every is not None and every < 1:
        raise SecateurError(f"every is {every}; expected 1 step or more")


def check_turns(schedule: str, length: int, every: int) -> None:
    """Raises SecateurError when masks are chosen so seldom that turns of the schedule are missed."""
    turns = TURNS.get(schedule, 0)
    if turns and every * turns > max(length, turns):
        raise SecateurError(
            f"the schedule {schedule} takes {turns} turns in {length} steps; masks that are chosen every {every} steps "
            f"miss some: choose every {max(length // turns, 1)} or fewer"
        )


def check_structures(structures: Structures, name: str, method: Method) -> None:
    """Raises SecateurError when the method does not go with whole units, or they are cut already."""
    if structures.finished:
        raise SecateurError("the units of these structures are cut already: make new ones of the model as it is now")
    if method.choose is not gradual:
        raise SecateurError(f"whole units go gradually or in turns (ac-dc); the method {name} is for single weights")


def check_recipe(plan: Plan, name: str, model: nn.Module, data: Any) -> None:
    """Raises SecateurError when a training step cannot choose so."""
    recipe, needs = plan.recipe, plan.needs
    if METHODS[name].watch is not None and any(setting.threshold is not None for setting in plan.settings):
        raise SecateurError(f"a threshold is on the size of weights, which {name} does not go by: give a sparsity")
    if data is not None and any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise SecateurError(
            "calibration runs on a copy of the model, and a sharded one has none: use magnitude or taylor"
        )
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


def check_ranks(masks: Masks) -> None:
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
