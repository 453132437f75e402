"""Choose what goes: units by their scores, experts, heads by number; and prove that it can go."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.recipe import nearest
from secateur.structure import experts
from secateur.structure.attention import replace_
from secateur.structure.budget import COSTS, Costs
from secateur.structure.coupling import Coupling, Ints
from secateur.structure.couplings import Couplings
from secateur.structure.criteria import importance
from secateur.structure.experts import check_experts, experts_cut, keep_experts, mixtures
from secateur.structure.plans import RECOMPUTED, Attribute, Plan, Removal, Tensors, describe, ranges, sizes_of
from secateur.structure.proof import Wrong, check
from secateur.structure.rehearsal import compared
from secateur.structure.running import Inputs, evaluating, runner
from secateur.structure.selection import (
    LEAST,
    NOT_BY_DEFAULT,
    by_budget,
    by_ratio,
    candidates,
    check_patterns,
    matches,
    touches,
)
from secateur.structure.sizes import Clash, Values, owners, table_of
from secateur.structure.surgery import Cut, cut_of, dead_of, mask_
from secateur.structure.watch import tensors_of
from secateur.weights.gradients import Loss

ALLOCATIONS = ("uniform", "global")


def plan(
    couplings: Couplings,
    *,
    remove: Mapping[str, float] | None = None,
    target: Mapping[str, float] | None = None,
    units: Mapping[str, Sequence[int]] | None = None,
    criterion: str = "magnitude",
    batches: Sequence[Any] = (),
    loss: Loss | None = None,
    scores: Mapping[str, Tensor] | None = None,
    reduce: str | None = None,
    allocation: str = "uniform",
    include: Sequence[str] = (),
    protect: Sequence[str] = (),
    multiple: int | None = None,
    least: float = LEAST,
    steps: int = 1,
    seed: int = 0,
) -> Plan:
    """Choose what goes, and prove that it can. Nothing changes yet.

    remove: kind or glob -> the share of units that goes (or their number, where it is 1 or more), such as
    {"ffn": 0.3, "heads": 0.25}. target instead: what may remain at most, {"macs": 0.5} or {"bytes": 200e6}.
    units instead: the very units that go, coupling -> their numbers; equally many from each of its blocks.
    criterion, batches, loss, reduce: see `importance`; or scores of your own, coupling -> [units].
    allocation: of a target: the same share from every coupling ("uniform") or the least important units of all ("global").
    include, protect: kinds or globs that a target takes from, or that nothing is taken from.
    multiple: widths are rounded to it (by default 64, 8 for channels, less for narrow ones). least: share that a
    target leaves of every coupling.
    steps: repeat the choice on the masked model, a part of the way each time, so that scores follow what is gone.

    Raises SecateurError before anything is computed where the request makes no sense, and when the target is out of reach
    or the cut model does not compute what the masked one does.
    """
    if sum(asked is not None for asked in (remove, target, units)) != 1:
        raise SecateurError("say either what to remove ({'ffn': 0.3}) or what may remain (target={'macs': 0.5})")
    if units is not None:
        chosen_units = _by_number(couplings, units)
        return _proven(couplings, chosen_units, Costs(couplings), units)
    if remove is not None and include:
        raise SecateurError("include is for a target: remove says itself of what something goes")
    if allocation not in ALLOCATIONS:
        raise SecateurError(f"unknown allocation {allocation!r}; known for structure: {', '.join(ALLOCATIONS)}")
    _check_shares(remove or {}, target or {})
    if not (multiple is None or multiple >= 1) or not 0 <= least <= 1 or steps < 1:
        raise SecateurError(
            f"multiple {multiple}, least {least}, steps {steps}: expected a width of 1 or more, a share between 0 and 1, "
            "and 1 step or more"
        )
    _check_scores(couplings, scores or {})
    removed: dict[int, Ints] = {}
    costs = Costs(couplings)
    asked = asked_of(couplings, remove, include, protect)
    names = {coupling.name for coupling in asked}
    for step in range(1, steps + 1):
        found = scores or _scores(couplings, asked, removed, criterion, batches, loss, reduce, seed)
        found = {name: values for name, values in _gone_first(couplings, found, removed).items() if name in names}
        able = candidates(couplings, found, multiple, 0.0 if target is None else least)
        if remove is not None:
            removed = by_ratio(able, {key: _part(value, step, steps) for key, value in remove.items()})
        else:
            removed = by_budget(couplings, costs, able, part_of(costs, target or {}, step / steps), allocation)
    if not removed:
        raise SecateurError("nothing would go: the request is smaller than a single step of every coupling")
    return _proven(couplings, removed, costs, names)


def asked_of(
    couplings: Couplings, remove: Mapping[str, float] | None, include: Sequence[str] = (), protect: Sequence[str] = ()
) -> Couplings:
    """Those that a request takes from. Raises SecateurError for a pattern that means nothing."""
    check_patterns(couplings, [*(remove or {}), *include])
    check_patterns(couplings, protect, touches)

    def chosen(coupling: Coupling) -> bool:
        if any(touches(coupling, pattern) for pattern in protect):
            return False
        if remove is not None:
            return any(matches(coupling, pattern) for pattern in remove)
        if include:
            return any(matches(coupling, pattern) for pattern in include)
        return coupling.exact and coupling.kind not in NOT_BY_DEFAULT

    return replace(couplings, found=[coupling for coupling in couplings if chosen(coupling)])


def part_of(costs: Costs, target: Mapping[str, float], share: float) -> dict[str, float]:
    """What may remain when a share of the way to a target is gone."""
    whole = costs.of({})
    shares = {key: value if value <= 1 else min(value / whole[key], 1.0) for key, value in target.items()}
    return {key: 1 - (1 - value) * share for key, value in shares.items()}


def _by_number(couplings: Couplings, units: Mapping[str, Sequence[int]]) -> dict[int, Ints]:
    """Units that were named, checked. Raises SecateurError."""
    places = {coupling.name: number for number, coupling in enumerate(couplings)}
    found = {}
    for name, numbers in units.items():
        if name not in places:
            raise SecateurError(f"{name!r} is no coupling of this model{nearest(name, places)}")
        coupling = couplings[places[name]]
        wanted = np.unique(np.asarray(numbers, np.int64))
        if not len(wanted) or wanted[0] < 0 or wanted[-1] >= coupling.size or len(wanted) == coupling.size:
            raise SecateurError(
                f"{name} has units 0 to {coupling.size - 1}, of which some have to stay; given: {numbers}"
            )
        shares = {np.isin(block, wanted).mean() for block in coupling.blocks}
        if len(shares) > 1:
            raise SecateurError(
                f"{name} loses equal shares of each of its {len(coupling.blocks)} blocks; given: {numbers}"
            )
        if len(wanted) % coupling.grain:
            raise SecateurError(f"{name} loses {coupling.grain} units at a time; given: {numbers}")
        found[places[name]] = wanted
    return found


def plan_heads(couplings: Couplings, heads: Mapping[int, Sequence[int]]) -> Plan:
    """A plan that removes attention heads by their numbers: layer -> query heads, as transformers' prune_heads took them.

    With grouped queries a key-value head goes with all of its query heads, so that whole groups have to be named.
    Raises SecateurError when that is not so, or a layer has no such heads.
    """
    units: dict[str, list[int]] = {}
    for layer, numbers in heads.items():
        found = [c for c in couplings if c.kind == "heads" and f".{layer}." in f".{c.name.replace(':', '.')}."]
        if len(found) != 1:
            what = "none" if not found else f"several: {', '.join(c.name for c in found)}"
            raise SecateurError(f"layer {layer}: expected one group of attention heads, found {what}")
        coupling = found[0]
        inner = [c for c in couplings if c.kind == "queries" and c.name.split(":")[0] == coupling.name.split(":")[0]]
        each = inner[0].size if inner else 1
        groups = sorted({number // each for number in numbers})
        if len(set(numbers)) != each * len(groups):
            raise SecateurError(
                f"layer {layer}: its query heads come in groups of {each} that share keys and values; name whole groups "
                f"(0 to {each - 1}, {each} to {2 * each - 1}, ..), given: {sorted(numbers)}"
            )
        units[coupling.name] = groups
    return plan(couplings, units=units)


def plan_experts(model: nn.Module, example_inputs: Inputs, left: int, scores: Mapping[str, Tensor]) -> Plan:
    """Choose the experts that stay in every layer, `left` of each, and prove that the others can go. Nothing changes yet.

    scores: layer of experts -> importance [experts], such as those of `expert_scores`. Raises SecateurError for a number
    that routing cannot do with, and when the cut model differs from the one whose router never takes the others.
    """
    found = mixtures(model)
    kept = keep_experts(found, scores, left)
    cut = experts_cut(model, found, kept)
    with evaluating(model):
        try:
            apart = check_experts(model, found, kept, runner(model, example_inputs))
        except Wrong as error:
            raise SecateurError(str(error)) from None
    if not apart <= experts.TOLERANCE:
        raise SecateurError(
            f"without these experts the outputs differ by {apart:.1e} of the largest from those when they are not chosen"
        )
    changes = _changes(model, cut)
    before, trained = sizes_of(model), {name for name, _ in model.named_parameters()}
    gone = {name: math.prod(change.before) - math.prod(change.after) for name, change in changes.items()}
    tensors = tensors_of(model)
    after = {
        "params": before["params"] - sum(size for name, size in gone.items() if name in trained),
        "bytes": before["bytes"] - sum(size * tensors[name].element_size() for name, size in gone.items()),
    }
    return Plan(
        type(model).__name__,
        changes,
        _attributes(model, cut.attributes[0]),
        tuple(Removal(f"{m.name}:experts", "experts", m.count, ranges(kept[m.name]), True) for m in found),
        {},
        "removed == never chosen",
        apart,
        before,
        after,
        describe(example_inputs),
        experts={name: ranges(indices) for name, indices in kept.items()},
    )


def _changes(model: nn.Module, cut: Cut) -> dict[str, Tensors]:
    """What a cut does to every tensor."""
    tensors = tensors_of(model)
    return {
        name: Tensors(
            tuple(tensors[name].shape),
            tuple(len(dims[d]) if d in dims else n for d, n in enumerate(tensors[name].shape)),
            {dim: ranges(indices) for dim, indices in dims.items()},
        )
        for name, dims in cut.kept.items()
    }


def _attributes(model: nn.Module, values: Values) -> tuple[Attribute, ...]:
    """Integers that change, by the names of their owners."""
    holders, found = owners(model), []
    for (number, name, place), value in values.items():
        path, owner = holders[number]
        now = table_of(owner)[name]
        before = now if place < 0 else now[place]
        if before != value:
            found.append(Attribute(path, name, place, before, value))
    return tuple(found)


def _check_shares(remove: Mapping[str, float], target: Mapping[str, float]) -> None:
    for name, value in remove.items():
        if not value > 0 or (value >= 1 and not isinstance(value, int)):
            raise SecateurError(
                f"remove {name}: {value!r}; expected a share between 0 and 1, or a whole number of units"
            )
    for name, value in target.items():
        if name not in COSTS:
            raise SecateurError(f"unknown budget {name!r}{nearest(name, COSTS)}; known: {', '.join(COSTS)}")
        if not value > 0:
            raise SecateurError(f"target {name}: {value!r}; expected the share that may remain, or a number above 1")


def _check_scores(couplings: Couplings, scores: Mapping[str, Tensor]) -> None:
    sizes = {coupling.name: coupling.size for coupling in couplings}
    for name, values in scores.items():
        if tuple(values.shape) != (sizes.get(name),) or bool(torch.isnan(values).any()):
            wanted = f"{sizes[name]} numbers" if name in sizes else "no such coupling"
            raise SecateurError(f"scores of {name}: expected {wanted}, found {list(values.shape)} or NaN")


def _part(value: float, step: int, steps: int) -> float:
    return value * step / steps if value < 1 or step == steps else max(value * step / steps, 1)


def _scores(
    couplings: Couplings,
    asked: Couplings,
    removed: Mapping[int, Ints],
    criterion: str,
    batches: Sequence[Any],
    loss: Loss | None,
    reduce: str | None,
    seed: int,
) -> dict[str, Tensor]:
    """The scores of the units that are asked for, in the model in which those that are gone are zero."""
    if not asked.found:
        return {}
    undo: Callable[[], None] = lambda: None  # noqa: E731
    if removed:
        dead = dead_of(couplings.facts, [(couplings[number], units) for number, units in removed.items()])
        undo = mask_(couplings.model, cut_of(couplings.facts, dead))
    try:
        with evaluating(couplings.model):
            return importance(asked, criterion, batches=batches, loss=loss, reduce=reduce, seed=seed)
    finally:
        undo()


def _gone_first(
    couplings: Couplings, scores: Mapping[str, Tensor], removed: Mapping[int, Ints]
) -> Mapping[str, Tensor]:
    """What an earlier step removed stays removed."""
    result = dict(scores)
    for number, units in removed.items():
        name = couplings[number].name
        if name in result:
            result[name] = result[name].clone()
            result[name][torch.from_numpy(units)] = -torch.inf
    return result


def _proven(couplings: Couplings, removed: Mapping[int, Ints], costs: Costs, asked: Container[str]) -> Plan:
    """The plan, after the cut model was compared with the masked one. Raises SecateurError when they differ."""
    model, facts = couplings.model, couplings.facts
    run = runner(model, couplings.inputs)
    pairs = [(couplings[number], units) for number, units in removed.items()]
    with evaluating(model):
        undo = replace_(model)
        try:
            dead = dead_of(facts, pairs)
            cut = cut_of(facts, dead)
            if not cut.kept:
                raise Wrong("no tensor would change; please report this")
            with compared(model, run, couplings.reference) as reference:
                seen = check(model, facts, cut, run, reference.numbers, dead)
            seen.within(reference.tolerance)
            kept = _changes(model, cut)
            attributes = _attributes(model, cut.attributes[seen.answer])
        except (Clash, Wrong) as error:
            raise SecateurError(
                f"this cut would not compute what it should, and nothing was changed: {error}\n"
                "  Protect what it touches (protect=...), or remove another share."
            ) from None
        finally:
            undo()
    removals = tuple(_removal(c, removed.get(number), c.name in asked) for number, c in enumerate(couplings))
    shares = {number: 1 - len(units) / couplings[number].size for number, units in removed.items()}
    return Plan(
        type(model).__name__,
        kept,
        attributes,
        removals,
        dict(couplings.protected),
        RECOMPUTED if seen.restricted else "removed == masked",
        seen.difference,
        costs.of({}),
        costs.of(shares),
        describe(couplings.inputs),
    )


def _removal(coupling: Coupling, units: Ints | None, asked: bool) -> Removal:
    left = np.ones(coupling.size, bool)
    if units is not None:
        left[units] = False
    why = "" if units is not None else "as important as what stays" if asked else "not asked for"
    return Removal(coupling.name, coupling.kind, coupling.size, ranges(np.flatnonzero(left)), coupling.exact, why)
