"""Choose blocks, or attention and MLPs alone, by how much they turn the hidden state; and prove that they can go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from secateur.errors import SecateurError
from secateur.structure import depth
from secateur.structure.depth import block_influence, check_drop, drop_, least_important, stacks
from secateur.structure.plans import Layers, Plan, Sublayer, describe, sizes_of
from secateur.structure.proof import Wrong
from secateur.structure.running import Cached, Inputs, cached, check_cached, evaluating, runner
from secateur.structure.sublayers import KINDS, check_remove, remove_, sublayer_influence, sublayers, with_unread


def plan_layers(
    model: nn.Module,
    example_inputs: Inputs,
    count: int,
    *,
    scores: Mapping[str, float] | None = None,
    batches: Sequence[Any] = (),
    contiguous: bool = False,
    protect: Sequence[str] = (),
) -> Plan:
    """Choose whole blocks to drop, and prove that they can go. Nothing changes yet.

    scores: block -> importance; by default the block influence that is measured on batches (or on the example inputs).
    contiguous: blocks behind one another. protect: globs over the names of blocks. A block that others need (the first of
    T5, which holds the position biases of all) is found by the proof, and another one takes its place.

    Raises SecateurError when so many blocks cannot go.
    """
    with evaluating(model):
        lists = stacks(model)
        names = [name for members in lists.values() for name in members]
        fixed = _protected(names, protect)
        least_important(model, count, dict.fromkeys(names, 0.0), contiguous, fixed)  # so many, before they are measured
        scores = dict(scores or block_influence(model, batches or [example_inputs]))
        run = runner(model, example_inputs)
        before = cached(model, example_inputs)

        def check(gone: Sequence[str]) -> float:
            kept = _kept(lists, gone)
            return _continuing(check_drop(model, kept, run), drop_(model, kept), model, example_inputs, before)

        gone, apart, refused = _settled(
            lambda refused: least_important(model, count, scores, contiguous, fixed | {*refused}), check
        )
    kept = _kept(lists, gone)
    size, left = _sizes(model, drop_(model, kept))
    layers = {parent: Layers(len(lists[parent]), tuple(places)) for parent, places in kept.items()}
    return _plan(model, example_inputs, refused, apart, size, left, layers=layers)


def plan_sublayers(
    model: nn.Module,
    example_inputs: Inputs,
    remove: Mapping[str, float],
    *,
    scores: Mapping[str, float] | None = None,
    batches: Sequence[Any] = (),
    protect: Sequence[str] = (),
) -> Plan:
    """Choose attention or MLPs that go while the rest of their blocks stays, and prove that they can. Nothing changes yet.

    remove: "attention", "mlp" -> how many of them go, or a share below 1. scores: sublayer -> importance; by default their
    influence on what their block returns, measured on batches (or on the example inputs). protect: globs over their names.
    Norms and layers that only fed what goes are removed with it.

    Raises SecateurError when the model has not so many of them, or they cannot go.
    """
    unknown = sorted(set(remove) - set(KINDS))
    if unknown:
        raise SecateurError(f"unknown kind of sublayer {unknown[0]!r}; known: {', '.join(KINDS)}")
    with evaluating(model):
        run = runner(model, example_inputs)
        found = sublayers(model, run)
        fixed = _protected(found, protect)
        _least(found, dict.fromkeys(found, 0.0), remove, fixed)  # so many, before they are measured
        scores = dict(scores or sublayer_influence(model, batches or [example_inputs], found))
        before = cached(model, example_inputs)

        def check(names: Sequence[str]) -> float:
            absent = {name: found[name] for name in names}
            return _continuing(check_remove(model, absent, run), remove_(model, absent), model, example_inputs, before)

        names, apart, refused = _settled(lambda refused: _least(found, scores, remove, fixed | {*refused}), check)
        absent = with_unread(model, {name: found[name] for name in names}, run)
    size, left = _sizes(model, remove_(model, absent))
    return _plan(model, example_inputs, refused, apart, size, left, sublayers=absent)


def _least(
    found: Mapping[str, Sublayer], scores: Mapping[str, float], remove: Mapping[str, float], fixed: Collection[str]
) -> list[str]:
    """Those of each kind with the lowest scores, the lowest first."""
    chosen = []
    for kind, asked in remove.items():
        if not asked > 0 or (asked >= 1 and not isinstance(asked, int)):
            raise SecateurError(f"{kind}={asked!r}: expected a share between 0 and 1, or a whole number")
        all_of_kind = [name for name, was in found.items() if was.kind == kind]
        able = [name for name in all_of_kind if name in scores and name not in fixed]
        count = round(asked * len(all_of_kind)) if asked < 1 else int(asked)
        if not 0 < count <= len(able):
            raise SecateurError(
                f"{kind}={asked:g}: the model has {len(all_of_kind)} sublayers of this kind that a block can do without, "
                f"of which {len(able)} can go"
            )
        chosen += sorted(able, key=scores.__getitem__)[:count]
    return chosen


def _settled(
    choose: Callable[[Collection[str]], Sequence[str]], check: Callable[[Sequence[str]], float]
) -> tuple[Sequence[str], float, dict[str, str]]:
    """What can go, how far the outputs are apart then, and what was chosen first and had to stay: name -> why."""
    refused: dict[str, str] = {}
    while True:
        chosen = choose(refused.keys())
        try:
            return chosen, _checked(check(chosen)), refused
        except Wrong:
            refused |= _guilty(chosen, check)


def _guilty(chosen: Sequence[str], check: Callable[[Sequence[str]], float]) -> dict[str, str]:
    """Those that cannot go even alone; or the first that cannot go with those before it."""
    alone = {name: why for name in chosen if (why := _reason(check, [name]))}
    if alone:
        return alone
    count = next(n for n in range(2, len(chosen) + 1) if n == len(chosen) or _reason(check, chosen[:n]))
    others = ", ".join(chosen[: count - 1])
    return {chosen[count - 1]: f"not together with {others}: {_reason(check, chosen[:count])}"}


def _reason(check: Callable[[Sequence[str]], float], names: Sequence[str]) -> str:
    """Why they cannot go; empty where they can."""
    try:
        _checked(check(names))
        return ""
    except Wrong as error:
        return str(error)


def _checked(apart: float) -> float:
    if not apart <= depth.TOLERANCE:
        raise Wrong(f"others need it: without it the outputs differ by {apart:.1e} from those when it is skipped")
    return apart


def _continuing(
    apart: float, undo: Callable[[], None], model: nn.Module, inputs: Inputs, before: Cached | None
) -> float:
    """The same number, after it was seen that a cache still works on the cut model, which comes back as it was."""
    try:
        check_cached(model, inputs, before)
    finally:
        undo()
    return apart


def _kept(lists: Mapping[str, Sequence[str]], gone: Collection[str]) -> dict[str, list[int]]:
    """List of blocks -> places that stay, for those that lose some."""
    kept = {parent: [place for place, name in enumerate(names) if name not in gone] for parent, names in lists.items()}
    return {parent: places for parent, places in kept.items() if len(places) < len(lists[parent])}


def _protected(names: Collection[str], patterns: Sequence[str]) -> set[str]:
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def _sizes(model: nn.Module, undo: Callable[[], None]) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes before and after; undo gives the model back as it was."""
    after = sizes_of(model)
    undo()
    return sizes_of(model), after


def _plan(
    model: nn.Module,
    example_inputs: Inputs,
    refused: Mapping[str, str],
    apart: float,
    before: Mapping[str, int],
    after: Mapping[str, int],
    **what: Any,
) -> Plan:
    described = describe(example_inputs)
    name = type(model).__name__
    return Plan(name, {}, (), (), refused, "removed == masked", apart, before, after, described, **what)
