"""Attention or MLP that goes alone, and leaves the rest of its block.

What is a sublayer is found by what it does: a part of a block with weights of its own, such that the block without all of
them hands on its input, and with any one of them does not. Attention is what lets one position see another, an MLP is what
does not: names decide nothing. Where one was stands a module that adds nothing; what only fed it goes with it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.structure.depth import all_given, first_of, stacks
from secateur.structure.plans import Sublayer
from secateur.structure.proof import Wrong, difference, returned
from secateur.structure.running import Inputs, evaluating, run_all
from secateur.structure.watch import FAILURES, outputs_of

ATTENTION, MLP, UNREAD = "attention", "mlp", "unread"
KINDS = (ATTENTION, MLP)
SAME = 1e-6  # of the largest entry: a block that hands on what it was given
MOST = 4  # parts of a block that may be sublayers
PLAIN = (bool, int, float, str, type(None))


Absent = Mapping[str, Sublayer]


class Nothing(nn.Module):
    """Stands where a sublayer was: adds nothing, or hands on its input."""

    def __init__(self, was: nn.Module, sublayer: Sublayer) -> None:
        super().__init__()
        for name, value in vars(was).items():  # that others read: layer_idx, is_causal
            if type(value) in PLAIN and not name.startswith("_") and name != "training":
                setattr(self, name, value)
        self._sublayer, self.width = sublayer, sublayer.width

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing, in the form of what was returned here."""
        was = self._sublayer
        given = all_given(args, kwargs)
        if was.hands_on >= 0:
            out = given[was.hands_on]
        elif self.width:
            out = given[0].new_zeros(*given[0].shape[:-1], self.width)
        else:
            out = torch.zeros_like(given[0])
        return (out, *[None] * (was.returns - 1)) if was.returns else out

    def extra_repr(self) -> str:
        return f"in place of {self._sublayer.kind}"


@dataclass
class _Call:
    """What a module was given, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def sublayers(model: nn.Module, run: Callable[[], Any]) -> dict[str, Sublayer]:
    """Name -> sublayer, for every block that has two or more of them; a block with one is that one."""
    blocks = [name for names in stacks(model).values() for name in names]
    found: dict[str, Sublayer] = {}
    with torch.no_grad(), evaluating(model):
        calls = _calls(model, blocks, run)
        for name in blocks:
            if name in calls:
                found.update(_of_block(model, name, calls))
    return found


def _calls(model: nn.Module, blocks: Sequence[str], run: Callable[[], Any]) -> dict[str, _Call]:
    """The first call of every block, and of every part of one that holds weights."""
    found: dict[str, _Call] = {}
    handles = []
    for block in blocks:
        for name in (block, *_parts(model, block)):

            def keep(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                found.setdefault(name, _Call(args, kwargs, output))

            handles.append(model.get_submodule(name).register_forward_hook(keep, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _parts(model: nn.Module, block: str) -> list[str]:
    """The children of a block that hold weights; of a mere list of modules, its members."""
    found = []
    for name, child in model.get_submodule(block).named_children():
        path = f"{block}.{name}"
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            found += _parts(model, path)
        elif any(True for _ in child.parameters()):
            found.append(path)
    return found


def _of_block(model: nn.Module, block: str, calls: Mapping[str, _Call]) -> dict[str, Sublayer]:
    given = next(iter(all_given(calls[block].args, calls[block].kwargs)), None)
    if given is None or given.ndim != 3 or not given.is_floating_point():
        return {}
    able = {}
    parts = set(_parts(model, block))
    for name in [name for name in calls if name in parts]:  # as they ran: what feeds a sublayer before it
        out = first_of(calls[name].output)
        heavy = any(p.ndim > 1 for p in model.get_submodule(name).parameters())
        if heavy and out is not None and out.shape[-1] == given.shape[-1] and out.numel() == given.numel():
            able[name] = calls[name]
    if not 2 <= len(able) <= MOST:
        return {}
    for ways in _ways(able, given):
        found = {name: _described(able[name], way) for name, way in zip(able, ways, strict=True)}
        if not _passes_on(model, block, calls[block], found):
            continue
        for name in able:
            others = {other: was for other, was in found.items() if other != name}
            if _passes_on(model, block, calls[block], others):
                found = others
        if len(found) < 2:
            return {}
        attention = {name for name in found if _looks_elsewhere(model.get_submodule(name), able[name])}
        return {n: replace(sublayer, kind=ATTENTION if n in attention else MLP) for n, sublayer in found.items()}
    return {}


def _ways(able: Mapping[str, _Call], given: Tensor) -> list[tuple[int, ...]]:
    """What each of the parts may hand on, the same for all of them first."""
    each = []
    for call in able.values():
        tensors = all_given(call.args, call.kwargs)
        each.append([-1, *(place for place, tensor in enumerate(tensors) if tensor.shape == given.shape)])
    return sorted(itertools.product(*each), key=lambda ways: len(set(ways)))


def _described(call: _Call, hands_on: int) -> Sublayer:
    out = first_of(call.output)
    assert out is not None
    width = out.shape[-1] if out.shape[-1] != all_given(call.args, call.kwargs)[0].shape[-1] else 0
    return Sublayer(MLP, hands_on, len(call.output) if isinstance(call.output, tuple) else 0, width)


def _looks_elsewhere(module: nn.Module, call: _Call) -> bool:
    """Whether what one position is given changes what another one returns, or what an encoder said does."""
    tensors = [t for t in all_given(call.args, call.kwargs) if t.is_floating_point() and t.ndim > 1]
    before = first_of(module.forward(*call.args, **call.kwargs))
    assert before is not None
    places = tensors[0].shape[:-1]
    for tensor in tensors:
        other = tensor.clone(memory_format=torch.contiguous_format)
        other.view(-1, other.shape[-1])[0] += 1 + other.abs().max()
        args = tuple(other if value is tensor else value for value in call.args)
        kwargs = {key: other if value is tensor else value for key, value in call.kwargs.items()}
        after = first_of(module.forward(*args, **kwargs))
        assert after is not None
        changed = (before != after).reshape(places.numel(), -1).any(-1)
        if bool(changed[1 if tensor.shape[:-1] == places else 0 :].any()):
            return True
    return False


def _passes_on(model: nn.Module, block: str, call: _Call, absent: Absent) -> bool:
    """Whether the block returns what it was given when these parts of it are absent."""
    given = all_given(call.args, call.kwargs)[0]
    with _standing_in(model, absent):
        try:
            out = first_of(model.get_submodule(block).forward(*call.args, **call.kwargs))
        except FAILURES:
            return False
    return out is not None and out.shape == given.shape and difference([given], [out]) < SAME


@contextlib.contextmanager
def _standing_in(model: nn.Module, absent: Absent) -> Iterator[None]:
    undo = replace_by_nothing_(model, absent)
    try:
        yield
    finally:
        undo()


def replace_by_nothing_(model: nn.Module, absent: Absent) -> Callable[[], None]:
    """Put `Nothing` where sublayers are. Returns what undoes it."""
    were = {name: model.get_submodule(name) for name in absent}

    def put(modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            parent, _, key = name.rpartition(".")
            model.get_submodule(parent)._modules[key] = module

    put({name: Nothing(module, absent[name]) for name, module in were.items()})
    return lambda: put(were)


def with_unread(model: nn.Module, absent: Absent, run: Callable[[], Any]) -> dict[str, Sublayer]:
    """The sublayers, and the parts of their blocks that nothing reads any more: norms before them, layers that fed them.

    A part is not read when the block returns the same although that part returns NaN.
    """
    found = dict(absent)
    blocks = [name for names in stacks(model).values() for name in names]
    touched = [block for block in blocks if any(name.startswith(f"{block}.") for name in absent)]
    with torch.no_grad(), evaluating(model):
        calls = _calls(model, touched, run)
        for block in touched:
            for name in _parts(model, block):
                if name not in found and name in calls and not _read(model, block, name, calls[block], absent):
                    out = first_of(calls[name].output)
                    if out is not None and not isinstance(calls[name].output, tuple):
                        found[name] = Sublayer(UNREAD, 0, 0, 0)
    return found


def _read(model: nn.Module, block: str, name: str, call: _Call, absent: Absent) -> bool:
    poison = model.get_submodule(name).register_forward_hook(lambda module, args, output: _nan(output))
    with _standing_in(model, absent):
        try:
            out = model.get_submodule(block).forward(*call.args, **call.kwargs)
        except FAILURES:
            return True
        finally:
            poison.remove()
    return any(bool(t.isnan().any()) for t in outputs_of(out) if t.is_floating_point())


def _nan(output: Any) -> Any:
    return torch.full_like(output, torch.nan) if isinstance(output, Tensor) and output.is_floating_point() else output


def sublayer_influence(model: nn.Module, batches: Sequence[Inputs], found: Absent) -> dict[str, float]:
    """1 - E[cos(f(x), f'(x))] of every sublayer, where f is its block and f' the block without it: how much it turns what
    the block returns. The measure of He et al. 2024, arXiv:2406.15786, section 3, taken behind the block and not behind the
    sublayer, so that what the rest of the block makes of it counts.
    """
    sums = {name: [0.0, 0] for name in found}
    handles = []
    for names in stacks(model).values():
        for block in names:
            own = {name: found[name] for name in found if name.startswith(f"{block}.")}
            if own:
                handles.append(
                    model.get_submodule(block).register_forward_hook(_turned(model, own, sums), with_kwargs=True)
                )
    run_all(model, batches, handles)
    return {name: 1 - total / count for name, (total, count) in sums.items() if count}


def _turned(model: nn.Module, own: Absent, sums: dict[str, list[Any]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        whole = first_of(output)
        assert whole is not None
        for name, sublayer in own.items():
            with _standing_in(model, {name: sublayer}):
                without = first_of(module.forward(*args, **kwargs))
            assert without is not None
            cosine = F.cosine_similarity(whole.float(), without.float(), dim=-1)
            sums[name][0] += float(cosine.sum())
            sums[name][1] += cosine.numel()

    return hook


def remove_(model: nn.Module, absent: Absent) -> Callable[[], None]:
    """Take sublayers out, and number the caches of the attention that stays. Returns what undoes it."""
    numbers = list(_numbers(model, absent))
    undo = replace_by_nothing_(model, absent)
    for table, name, _, after in numbers:
        table[name] = after

    def back() -> None:
        undo()
        for table, name, before, _ in numbers:
            table[name] = before

    return back


def _numbers(model: nn.Module, absent: Absent) -> Iterator[tuple[dict[str, Any], str, int, int]]:
    """A cache has a slot for each layer, and its first one says how long it is: attention that stays takes the first slots
    of its type (sliding, full). Integers in the attention that number the blocks are those slots.
    """
    for names in stacks(model).values():
        types = getattr(getattr(model, "config", None), "layer_types", None)
        kinds = list(types) if types is not None and len(types) == len(names) else [""] * len(names)
        paths = {n[len(block) + 1 :] for block in names for n in absent if n.startswith(f"{block}.")}
        for path in sorted(paths):
            members = {place: m for place, block in enumerate(names) if (m := _at(model, f"{block}.{path}"))}
            stay = [
                place for place in members if getattr(absent.get(f"{names[place]}.{path}"), "kind", "") != ATTENTION
            ]
            slots = {kind: iter([place for place in members if kinds[place] == kind]) for kind in set(kinds)}
            keys = _numbering(members) if len(stay) < len(members) else []
            for place in stay:
                slot = next(slots[kinds[place]])
                for inner, attribute in keys:
                    yield vars(members[place].get_submodule(inner)), attribute, place, slot


def _at(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _numbering(members: Mapping[int, nn.Module]) -> list[tuple[str, str]]:
    """Attributes that number the members by their places: 0, 1, 2, .."""
    tables = {
        place: {(path, name): value for path, module in member.named_modules() for name, value in vars(module).items()}
        for place, member in members.items()
    }
    if len(tables) < 2:
        return []
    first = next(iter(tables.values()))
    return [key for key in first if all(type(t.get(key)) is int and t[key] == place for place, t in tables.items())]


def check_remove(model: nn.Module, absent: Absent, run: Callable[[], Any]) -> float:
    """The relative difference of the model without sublayers and the one in which they return nothing. Raises Wrong."""
    with torch.no_grad():
        with _silenced(model, absent):
            want = returned(run())
        undo = remove_(model, absent)
        try:
            got = returned(run())
        except FAILURES as error:
            raise Wrong(f"the model does not run without them: {error}") from None
        finally:
            undo()
    return difference(want, got)


@contextlib.contextmanager
def _silenced(model: nn.Module, absent: Absent) -> Iterator[None]:
    """The sublayers run, and the first tensor of what they return is replaced."""
    handles = []
    for name, sublayer in absent.items():
        if sublayer.kind == UNREAD:
            continue

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, hands_on: int = sublayer.hands_on) -> Any:
            out = first_of(output)
            assert out is not None
            instead = torch.zeros_like(out) if hands_on < 0 else all_given(args, kwargs)[hands_on]
            return (instead, *output[1:]) if isinstance(output, tuple) else instead

        handles.append(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
