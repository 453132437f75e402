"""Walk calibration batches through a model block by block.

The real forward of every batch runs in a greenlet of its own and is suspended at the entry of each block. Nothing is
rebuilt or replayed between blocks: masks, rotary embeddings, caches, encoder and decoder stay the model's own business.
(Threads would do as well, but each brings a malloc arena of its own.)
"""

from __future__ import annotations

import contextlib
import copy
import enum
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn


class Store(Protocol):
    """Where a block's weights are when nobody needs them."""

    def load(self, name: str, module: nn.Module) -> None: ...
    def free(self, name: str, module: nn.Module) -> None: ...


class Resident:
    """Weights that are always there."""

    def load(self, name: str, module: nn.Module) -> None: ...
    def free(self, name: str, module: nn.Module) -> None: ...


@dataclass(frozen=True)
class Call:
    """One batch, waiting at the entry of a block."""

    batch: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Visit:
    """A block, and the calls that wait for it. The block's weights are there while the visit lasts."""

    name: str
    module: nn.Module
    calls: Sequence[Call]

    def replay(self, without: Collection[int] = ()) -> Iterator[int]:
        """Run the block on the waiting calls, one after the other, and drop the outputs. without: batches to skip.

        Caches are copied, and tensors too once a call has changed its arguments in place: they are needed again.
        """
        careful = True
        for call in self.calls:
            if call.batch not in without:
                copies: dict[int, Any] = {}
                args, kwargs = (_copied(part, copies, careful) for part in (call.args, call.kwargs))
                with randomness([]):
                    self.module(*args, **kwargs)
                careful = careful and any(isinstance(c, torch.Tensor) and c._version for c in copies.values())
                yield call.batch


@contextlib.contextmanager
def randomness(states: list[torch.Tensor]) -> Iterator[None]:
    """Random numbers that go on from `states` (empty: from a fixed seed) and leave there how far they got: a forward that
    draws some gives the same, whatever runs between its parts. The caller's own go on as if nothing had been drawn.
    """
    generators = [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]
    before = [generator.get_state() for generator in generators]
    for index, generator in enumerate(generators):
        if index < len(states):
            generator.set_state(states[index])
        else:
            generator.manual_seed(0)
    try:
        yield
    finally:
        states[:] = [generator.get_state() for generator in generators]
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def _copied(value: Any, copies: dict[int, Any], tensors: bool) -> Any:
    """A copy of what a call could change: containers, objects that hold state, and tensors where asked. copies: by id of
    the original, so that what was one object stays one.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, torch.Tensor):
        found: Any = value.clone() if tensors else value
    elif type(value) in (list, tuple):
        found = type(value)(_copied(item, copies, tensors) for item in value)
    elif type(value) is dict:
        found = {key: _copied(item, copies, tensors) for key, item in value.items()}
    elif hasattr(value, "__dict__") and not callable(value) and not isinstance(value, (dict, enum.Enum)):
        # a cache, a layer of one, or something that is none the worse for it
        found = copies[id(value)] = copy.copy(value)
        if found is not value:
            vars(found).update({key: _copied(item, copies, tensors) for key, item in vars(value).items()})
    else:
        found = value
    copies[id(value)] = found
    return found


@dataclass
class _Traveler:
    batch: int
    greenlet: greenlet
    at: str | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    random: list[torch.Tensor] = field(default_factory=list)


class Stopped(Exception):
    """A batch finished without entering any block: the forward does not call them as modules."""


def walk(
    forward: Callable[[Any], Any],
    blocks: Mapping[str, nn.Module],
    batches: Sequence[Any],
    store: Store | None = None,
    finish: Callable[[int, Any], None] | None = None,
    to_the_end: Collection[int] = (),
) -> Iterator[Visit]:
    """Yield a visit per block. What the caller does to the block's weights is seen by all later blocks.

    forward: one batch -> the model's output. Batches in `to_the_end` run to the end, and finish gets (batch index,
    output); the others are abandoned after the last block, and what follows it (the output head) is never computed
    where every block is entered.
    A block entered a second time (shared blocks) runs with the weights it then has. Gradients are off throughout, and every
    batch has random numbers of its own, from one seed.
    """
    store = store or Resident()
    order = {name: index for index, name in enumerate(blocks)}
    hub = getcurrent()
    done: set[str] = set()
    loaded: set[str] = set()

    def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getcurrent() is not hub:
            hub.switch(name, args, kwargs)

    undo = [_intercept(module, functools.partial(enter, name)) for name, module in blocks.items()]
    travelers: list[_Traveler] = []
    with torch.no_grad():
        try:
            travelers = [_Traveler(index, greenlet(forward)) for index in range(len(batches))]
            for traveler in travelers:
                _advance(traveler, finish if traveler.batch in to_the_end else None, batches[traveler.batch])
            while waiting := [traveler for traveler in travelers if traveler.at is not None]:
                first = [t for t in waiting if t.batch not in to_the_end] or waiting  # the others only go along
                name = min((t.at for t in first if t.at is not None), key=order.__getitem__)
                here = [traveler for traveler in waiting if traveler.at == name]
                module = blocks[name]
                store.load(name, module)
                loaded.add(name)
                if name not in done:
                    done.add(name)
                    calls = [Call(t.batch, t.args, t.kwargs or {}) for t in here]
                    yield Visit(name, module, calls)
                    calls.clear()  # whoever still holds the visit holds no inputs
                last = len(done) == len(blocks)
                for traveler in here:
                    if last and traveler.batch not in to_the_end:
                        traveler.at = None
                    else:
                        _advance(traveler, finish if traveler.batch in to_the_end else None)
                store.free(name, module)
                loaded.discard(name)
            if batches and not done:
                raise Stopped
        finally:
            for traveler in travelers:
                if not traveler.greenlet.dead:
                    traveler.greenlet.throw(GreenletExit)
            for restore in undo:
                restore()
            for name in loaded:
                store.free(name, blocks[name])


def _intercept(module: nn.Module, enter: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Callable[[], None]:
    """Have `enter` called before the module's forward, whether the module is called or its forward directly (which no hook
    would see). Returns what undoes it.
    """
    forward, own = module.forward, "forward" in vars(module)

    @functools.wraps(forward)
    def entering(*args: Any, **kwargs: Any) -> Any:
        enter(args, kwargs)
        return forward(*args, **kwargs)

    def restore() -> None:
        if own:
            module.forward = forward  # type: ignore[method-assign]
        else:
            del module.forward

    module.forward = entering  # type: ignore[method-assign]
    return restore


def _advance(traveler: _Traveler, finish: Callable[[int, Any], None] | None, *start: Any) -> None:
    """Let a batch run on to its next block, or to the end of its forward."""
    traveler.args, traveler.kwargs = (), None
    with randomness(traveler.random):
        result = traveler.greenlet.switch(*start)
    if traveler.greenlet.dead:
        traveler.at = None
        if finish is not None:
            finish(traveler.batch, result)
    else:
        traveler.at, traveler.args, traveler.kwargs = result
