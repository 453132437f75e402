"""Carry out a plan on a module in memory: all of it, proven, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.structure.attention import SplitAttention, replace_
from secateur.structure.couplings import Inputs, evaluating, runner
from secateur.structure.planning import Plan, indices_of, inputs_from
from secateur.structure.proof import Wrong, check, run_listening
from secateur.structure.rehearsal import compared
from secateur.structure.sizes import Values, owners
from secateur.structure.surgery import Cut, alive_in, cut_, cut_of
from secateur.structure.watch import Facts, follow, outputs_of, tensors_of


def apply_(model: nn.Module, plan: Plan, example_inputs: Inputs | None = None) -> None:
    """Cut the model as planned, after the proof on this very model. Parameters keep their identity and lose indices.

    example_inputs: what to prove it on; by default inputs like those that the plan was made with. Optimizers that hold
    states of the old shapes have to be made anew.

    Raises SecateurError, and leaves the model as it was, when the plan is for another model or the proof fails.
    """
    inputs = inputs_from(plan.inputs) if example_inputs is None else example_inputs
    check_fits(model, plan)
    run = runner(model, inputs)
    with evaluating(model):
        undo = replace_(model)
        try:
            cut = cut_from(model, plan)
            facts = follow(model, run)
            dead = dead_from(facts, cut)
            if {n: {d: list(i) for d, i in k.items()} for n, k in cut_of(facts, dead).kept.items()} != {
                n: {d: list(i) for d, i in k.items()} for n, k in cut.kept.items()
            }:
                raise Wrong("its couplings are not those of this model")
            with compared(model, run) as (reference, tolerance):
                seen = check(model, facts, cut, run, reference, lambda dim: alive_in(facts, dim, dead))
            if not seen.difference <= tolerance:
                raise Wrong(f"removing differs from zeroing by {seen.difference:.1e} of the largest output")
            back = cut_(model, cut)
            try:
                _exercise(model, run)
            except BaseException:
                back()
                raise
        except Wrong as error:
            undo()
            raise SecateurError(f"the plan does not hold on this model, which stays as it was: {error}") from None
        except BaseException:
            undo()
            raise
        _keep_replaced(model, plan, undo)


def _keep_replaced(model: nn.Module, plan: Plan, undo: Any) -> None:
    """Attention that lost nothing is torch's own again."""
    cut = [n for n, m in model.named_modules() if isinstance(m, SplitAttention) and _touched(n, plan)]
    if not cut:
        undo()


def _touched(name: str, plan: Plan) -> bool:
    return any(tensor.startswith(f"{name}.") for tensor in plan.tensors)


def check_fits(model: nn.Module, plan: Plan) -> None:
    """Raises SecateurError when the model has not the tensors that the plan cuts."""
    tensors = tensors_of(model)
    for name, change in plan.tensors.items():
        found = tensors.get(name)
        if found is None or tuple(found.shape) != tuple(change.before):
            has = "no such tensor" if found is None else f"{list(found.shape)}"
            done = " (it was applied already)" if found is not None and tuple(found.shape) == change.after else ""
            raise SecateurError(
                f"the plan is for {plan.model} with {name} {list(change.before)}; this model has {has}{done}"
            )


def cut_from(model: nn.Module, plan: Plan) -> Cut:
    """The plan as a cut of this model."""
    places = {path: number for number, (path, _) in reversed(list(enumerate(owners(model))))}
    values: Values = {}
    for attribute in plan.attributes:
        if attribute.owner not in places:
            raise SecateurError(f"the plan sets {attribute.name} of {attribute.owner}, which this model does not have")
        values[(places[attribute.owner], attribute.name, attribute.place)] = attribute.after
    kept = {name: {d: indices_of(r) for d, r in change.kept.items()} for name, change in plan.tensors.items()}
    return Cut(kept, [values])


def dead_from(facts: Facts, cut: Cut) -> np.ndarray:
    """Which identities have lost all that they own."""
    owned = np.zeros(facts.ids.count, np.int64)
    alive = np.zeros(facts.ids.count, np.int64)
    for name, dims in facts.dims.items():
        for place, dim in enumerate(dims):
            for column in [] if dim is None else facts.ids.factors(dim):
                stays = np.ones(len(column), bool)
                if place in cut.kept.get(name, {}):
                    stays[:] = False
                    stays[cut.kept[name][place]] = True
                np.add.at(owned, column[column >= 0], 1)
                np.add.at(alive, column[(column >= 0) & stays], 1)
    return (owned > 0) & (alive == 0)


def _exercise(model: nn.Module, run: Any) -> None:
    """Forward and backward of the cut model, in its own dtype. Raises Wrong."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return
    run_listening(model, run)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        return
    with torch.enable_grad():
        outputs = [t for t in outputs_of(run()) if t.is_floating_point() and t.requires_grad]
        if outputs:
            total = sum((t.float().square().mean() for t in outputs), torch.zeros(()))
            gradients = torch.autograd.grad(total, trained, allow_unused=True)
            wrong = [p for p, g in zip(trained, gradients, strict=True) if g is not None and g.shape != p.shape]
            if wrong:
                raise Wrong("a gradient has not the shape of its parameter")


def parameter_map(plan: Plan) -> Mapping[str, Mapping[int, Any]]:
    """Old to new: tensor -> dimension -> the old indices that its new ones had."""
    return {n: {d: indices_of(r) for d, r in change.kept.items()} for n, change in plan.tensors.items()}


def narrow(tensor: Tensor, kept: Mapping[int, Any]) -> Tensor:
    """What remains of a tensor."""
    for dim, indices in kept.items():
        tensor = tensor.index_select(dim, torch.as_tensor(indices, device=tensor.device))
    return tensor
