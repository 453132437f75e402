"""Carry out a plan on a module in memory: all of it, proven, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.structure import depth, experts
from secateur.structure.attention import SplitAttention, replace_
from secateur.structure.depth import check_drop, drop_
from secateur.structure.experts import check_experts, mixtures
from secateur.structure.plans import Plan, indices_of, inputs_from
from secateur.structure.proof import Wrong, check, run_listening
from secateur.structure.rehearsal import compared
from secateur.structure.running import Inputs, cached, check_cached, evaluating, runner, writing
from secateur.structure.sizes import Values, owners
from secateur.structure.sublayers import Nothing, check_remove, remove_
from secateur.structure.surgery import Cut, cut_, cut_of
from secateur.structure.watch import Facts, follow, on_meta, outputs_of, tensors_of


def apply_(model: nn.Module, plan: Plan, example_inputs: Inputs | None = None) -> None:
    """Cut the model as planned, after the proof on this very model. Parameters keep their identity and lose indices.

    example_inputs: what to prove it on; by default inputs like those that the plan was made with. Optimizers that hold
    states of the old shapes have to be made anew.

    Raises SecateurError, and leaves the model as it was, when the plan is for another model or the proof fails.
    """
    inputs = inputs_from(plan.inputs) if example_inputs is None else example_inputs
    run = runner(model, inputs)
    with evaluating(model):
        back: list[Callable[[], None]] = []
        before, learns = cached(model, inputs), _learns(model, run)
        try:
            _drop(model, plan, run, back)
            _without_sublayers(model, plan, run, back)
            if plan.experts:
                _cut_experts(model, plan, run, back)
            elif plan.tensors:
                _cut(model, plan, inputs, run, back)
            _exercise(model, run, learns)
            check_cached(model, inputs, before)
        except BaseException as error:
            for step in reversed(back):
                step()
            if isinstance(error, Wrong):
                text = f"the plan does not hold on this model, which stays as it was: {error}"
                raise SecateurError(text) from None
            raise


def _drop(model: nn.Module, plan: Plan, run: Callable[[], Any], back: list[Callable[[], None]]) -> None:
    if not plan.layers:
        return
    check_layers(model, plan)
    kept = {parent: change.kept for parent, change in plan.layers.items()}
    apart = check_drop(model, kept, run)
    if not apart <= depth.TOLERANCE:
        raise Wrong(f"without the dropped blocks the outputs differ by {apart:.1e} from those when they are skipped")
    back.append(drop_(model, kept))


def _without_sublayers(model: nn.Module, plan: Plan, run: Callable[[], Any], back: list[Callable[[], None]]) -> None:
    if not plan.sublayers:
        return
    check_sublayers(model, plan)
    apart = check_remove(model, plan.sublayers, run)
    if not apart <= depth.TOLERANCE:
        raise Wrong(f"without these sublayers the outputs differ by {apart:.1e} from those when they add nothing")
    back.append(remove_(model, plan.sublayers))


def _cut_experts(model: nn.Module, plan: Plan, run: Callable[[], Any], back: list[Callable[[], None]]) -> None:
    check_fits(model, plan)
    kept = {name: indices_of(ranges) for name, ranges in plan.experts.items()}
    apart = check_experts(model, mixtures(model), kept, run)
    if not apart <= experts.TOLERANCE:
        raise Wrong(f"without the experts the outputs differ by {apart:.1e} from those when they are not chosen")
    back.append(cut_(model, cut_from(model, plan)))


def _cut(model: nn.Module, plan: Plan, inputs: Inputs, run: Callable[[], Any], back: list[Callable[[], None]]) -> None:
    check_fits(model, plan)
    back.append(replace_(model))
    cut = cut_from(model, plan)
    facts = follow(model, run, writing(model, inputs))
    dead = dead_from(facts, cut)
    if _plain(cut_of(facts, dead)) != _plain(cut):
        raise Wrong("its couplings are not those of this model")
    with compared(model, run) as reference:
        check(model, facts, cut, run, reference.numbers, dead).within(reference.tolerance)
    back.append(cut_(model, cut))
    if not _attention_cut(model, plan):
        back.pop(-2)()


def _plain(cut: Cut) -> dict[str, dict[int, list[int]]]:
    return {name: {dim: list(indices) for dim, indices in dims.items()} for name, dims in cut.kept.items()}


def _attention_cut(model: nn.Module, plan: Plan) -> bool:
    """Whether torch's own attention was cut, and has to stay what `replace_` made of it."""
    split = [name for name, module in model.named_modules() if isinstance(module, SplitAttention)]
    return any(tensor.startswith(f"{name}.") for name in split for tensor in plan.tensors)


def reshape_(model: nn.Module, plan: Plan) -> None:
    """Give a model the shapes of a plan without any proof: for weights that were cut already and are loaded next."""
    if plan.layers:
        check_layers(model, plan)
        drop_(model, {parent: change.kept for parent, change in plan.layers.items()})
    if plan.sublayers:
        check_sublayers(model, plan)
        remove_(model, plan.sublayers)
    if plan.tensors:
        check_fits(model, plan)
        undo = replace_(model)
        cut_(model, cut_from(model, plan))
        if not _attention_cut(model, plan):
            undo()


def check_layers(model: nn.Module, plan: Plan) -> None:
    """Raises SecateurError when the model has not the blocks that the plan drops."""
    for parent, change in plan.layers.items():
        try:
            found = len(model.get_submodule(parent))  # type: ignore[arg-type]
        except (AttributeError, TypeError):
            found = 0
        if found != change.before:
            raise SecateurError(
                f"the plan is for {plan.model} with {change.before} blocks in {parent}; this model has {found}"
            )


def check_sublayers(model: nn.Module, plan: Plan) -> None:
    """Raises SecateurError when the model has not the sublayers that the plan removes."""
    modules = dict(model.named_modules())
    for name in plan.sublayers:
        if name not in modules or not any(True for _ in modules[name].parameters()):
            done = " (it was applied already)" if isinstance(modules.get(name), Nothing) else ""
            raise SecateurError(f"the plan is for {plan.model} with weights in {name}; this model has none{done}")


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


def _learns(model: nn.Module, run: Callable[[], Any]) -> bool:
    """Whether gradients can be had at all; some code takes its own, or writes where a gradient needs what was there."""
    try:
        _exercise(model, run, True)
        return True
    except RuntimeError:
        return False


def _exercise(model: nn.Module, run: Callable[[], Any], learns: bool) -> None:
    """Forward and backward of the model, in its own dtype. Raises Wrong."""
    if on_meta(model):
        return
    try:
        run_listening(model, run)
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise Wrong(f"the cut model does not run: {type(error).__name__}: {error}") from None
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained or not learns:
        return
    with torch.enable_grad():
        outputs = [t for t in outputs_of(run()) if t.is_floating_point() and t.requires_grad]
        if outputs:
            total = sum((t.float().square().mean() for t in outputs), torch.zeros(()))
            gradients = torch.autograd.grad(total, trained, allow_unused=True)
            wrong = [p for p, g in zip(trained, gradients, strict=True) if g is not None and g.shape != p.shape]
            if wrong:
                raise Wrong("a gradient has not the shape of its parameter")
