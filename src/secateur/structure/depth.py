"""Whole blocks that go: which matter least, what their neighbors are renumbered to, and what the config has to say.

A block that is dropped hands on its input; dropping it is right when the model without it computes what the model computes
in which that block returns what it was given. That is checked, as everything is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.stream.blocks import find_blocks
from secateur.structure.hf_config import config_without
from secateur.structure.proof import Wrong, difference, returned
from secateur.structure.running import Inputs, run_all
from secateur.structure.watch import FAILURES, outputs_of

TOLERANCE = 1e-5

Kept = Mapping[str, Sequence[int]]  # name of a list of blocks -> the places that stay


def stacks(model: nn.Module) -> dict[str, list[str]]:
    """Name of a list of blocks -> names of its members, for every list that the model is a stack of."""
    found: dict[str, list[str]] = {}
    for name in find_blocks(model):
        parent, _, place = name.rpartition(".")
        members = model.get_submodule(parent)
        if place.isdigit() and isinstance(members, nn.ModuleList | nn.Sequential):
            found[parent] = [
                f"{parent}.{key}" for key in members._modules
            ]  # with those that have lost all that they had
    return found


def block_influence(model: nn.Module, batches: Sequence[Inputs]) -> dict[str, float]:
    """1 - E[cos(x, f(x))] of every block: how much it turns the hidden state. ShortGPT, Men et al. 2024, arXiv:2403.03853,
    eq. 1. Blocks whose output has another shape than their input have no influence to measure, and are left out.
    """
    sums: dict[str, list[float]] = {}
    handles = []
    for names in stacks(model).values():
        for name in names:
            handles.append(_listen(model.get_submodule(name), sums.setdefault(name, [0.0, 0.0])))
    run_all(model, batches, handles)
    return {name: 1 - total / count for name, (total, count) in sums.items() if count}


def _listen(module: nn.Module, sums: list[float]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given, after = all_given(args, kwargs), first_of(output)
        if given and after is not None and given[0].shape == after.shape:
            cosine = F.cosine_similarity(given[0].float(), after.float(), dim=-1)
            sums[0] += float(cosine.sum())
            sums[1] += cosine.numel()

    return module.register_forward_hook(hook, with_kwargs=True)


def all_given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a module was given; of a block, the first is the hidden state."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def first_of(output: Any) -> Tensor | None:
    """The first tensor of what a module returned."""
    return output if isinstance(output, Tensor) else next(iter(outputs_of(output)), None)


def least_important(
    model: nn.Module, count: int, scores: Mapping[str, float], contiguous: bool = False, protect: Collection[str] = ()
) -> list[str]:
    """The blocks that go: `count` of those with the lowest scores, the lowest first, or one run of them.

    Raises SecateurError when there are not so many.
    """
    lists = stacks(model)
    free = [(scores[n], parent, place) for parent, ns in lists.items() for place, n in enumerate(ns) if n in scores]
    free = [entry for entry in free if lists[entry[1]][entry[2]] not in protect]
    if not 0 < count < sum(len(names) for names in lists.values()) or count > len(free):
        have = sum(len(names) for names in lists.values())
        raise SecateurError(
            f"layers={count}: the model has {have} blocks, of which {len(free)} can go; some have to stay"
        )
    if contiguous:
        gone = _best_run(lists, {(parent, place): score for score, parent, place in free}, count)
    else:
        gone = [(parent, place) for _, parent, place in sorted(free)[:count]]
    if any(all((parent, place) in gone for place in range(len(names))) for parent, names in lists.items()):
        raise SecateurError(f"layers={count} would leave a list of blocks empty: drop fewer")
    return [lists[parent][place] for parent, place in gone]


def _best_run(
    lists: Mapping[str, Sequence[str]], scores: Mapping[tuple[str, int], float], count: int
) -> list[tuple[str, int]]:
    runs = [
        [(parent, place) for place in range(start, start + count)]
        for parent, names in lists.items()
        for start in range(len(names) - count + 1)
    ]
    runs = [run for run in runs if all(member in scores for member in run)]
    if not runs:
        raise SecateurError(f"no {count} blocks behind one another can go")
    return min(runs, key=lambda run: sum(scores[member] for member in run))


def drop_(model: nn.Module, kept: Kept) -> Callable[[], None]:
    """Drop blocks and renumber those that stay. Returns what undoes it."""
    undo = _config_follows(model, kept)
    for parent, places in kept.items():
        owner_name, _, key = parent.rpartition(".")
        owner, whole = model.get_submodule(owner_name), model.get_submodule(parent)
        members = list(whole)  # type: ignore[arg-type]
        for table, name, before, after in list(_renumbered(members, places)):
            table[name] = after
            undo.append(lambda table=table, name=name, before=before: table.__setitem__(name, before))
        left = [members[place] for place in places]
        owner._modules[key] = nn.ModuleList(left) if isinstance(whole, nn.ModuleList) else nn.Sequential(*left)
        undo.append(lambda owner=owner, key=key, whole=whole: owner._modules.__setitem__(key, whole))

    def back() -> None:
        for step in reversed(undo):
            step()

    return back


def _renumbered(members: Sequence[nn.Module], places: Sequence[int]) -> Iterator[tuple[dict[str, Any], str, int, int]]:
    """Integers that number the blocks: attributes that are 0, 1, 2, .. over all of them (layer_idx, whatever its name)."""
    numbered: list[dict[tuple[str, str], int]] = []
    for member in members:
        numbered.append(
            {
                (path, name): value
                for path, module in member.named_modules()
                for name, value in vars(module).items()
                if type(value) is int
            }
        )
    keys = [key for key in numbered[0] if all(found.get(key) == n for n, found in enumerate(numbered))]
    for new, old in enumerate(places):
        modules = dict(members[old].named_modules())
        for path, name in keys if len(members) > 1 else ():
            yield vars(modules[path]), name, old, new


def _config_follows(model: nn.Module, kept: Kept) -> list[Callable[[], None]]:
    """The model's config says how many blocks there are, where a config can; what it was comes back with the undo."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return []
    after = config_without(type(model), config, {p: (len(model.get_submodule(p)), ps) for p, ps in kept.items()})  # type: ignore[arg-type]
    if after is None:
        return []
    before = dict(vars(config))
    vars(config).update(vars(after))

    def back() -> None:
        vars(config).clear()
        vars(config).update(before)

    return [back]


@contextlib.contextmanager
def skipping(model: nn.Module, kept: Kept) -> Iterator[None]:
    """The blocks that would be dropped hand on their input."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = next(iter(all_given(args, kwargs)), None)
        if isinstance(output, Tensor):
            return given
        if isinstance(output, tuple):
            return (given, *output[1:])
        raise Wrong(f"a block that returns a {type(output).__name__} cannot be left out")

    handles = []
    for parent, places in kept.items():
        for place, member in enumerate(model.get_submodule(parent)):  # type: ignore[arg-type]
            if place not in places:
                handles.append(member.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_drop(model: nn.Module, kept: Kept, run: Callable[[], Any]) -> float:
    """The relative difference of the model without the blocks and the model that skips them. Raises Wrong."""
    with torch.no_grad():
        try:
            with skipping(model, kept):
                want = returned(run())
        except FAILURES:
            raise Wrong("they change the shape of what passes them") from None
        undo = drop_(model, kept)
        try:
            got = returned(run())
        except FAILURES as error:
            raise Wrong(f"the model does not run without them: {error}") from None
        finally:
            undo()
    return difference(want, got)
