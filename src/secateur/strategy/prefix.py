"""What a model computes before a layer: kept, so that a layer that is cut many times costs only what comes after it."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import call
from secateur.probe import answer

LIMIT = 1 << 30  # bytes that are kept of a batch

Kept = list[tuple[nn.Module, Tensor]]


class _Reached(BaseException):  # not an Exception: a model's own forward may catch those
    """The parameter is about to be used."""


def outputs_before(model: nn.Module, parameter: nn.Parameter, x: Tensor, limit: int = LIMIT) -> Kept:
    """The outermost modules that are done before any that holds the parameter itself begins, in the order of their calls,
    with what they gave. model: in eval mode. None of them for one that gives something else than a tensor, or that
    writes into its input; nothing at all where the parameter is never reached, or where it takes more than limit bytes.
    """
    holders = {module for module in model.modules() if any(p is parameter for p in module.parameters())}
    owners = {module for module in holders if any(p is parameter for p in module.parameters(recurse=False))}
    done: Kept = []
    begun: list[
        tuple[int, list[int]]
    ] = []  # of every module at work: how many were done before, versions of its inputs

    def enter(module: nn.Module, args: Any) -> None:
        if module in owners:
            raise _Reached
        begun.append((len(done), _versions(args)))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        before, versions = begun.pop()
        if module in holders:  # used by it, and not by a call of the module that it belongs to
            del done[before:]
            raise _Reached
        if isinstance(output, Tensor) and versions == _versions(args):
            done[before:] = [(module, output.clone())]
        if sum(output.numel() * output.element_size() for _, output in done) > limit:
            done.clear()
            raise _Reached

    with torch.no_grad(), _hooked(model, enter, leave):
        try:
            call(model, x)
        except _Reached:
            return done
    return []


@contextlib.contextmanager
def given(kept: Kept) -> Iterator[None]:
    """For one forward: modules give what they gave then in place of computing it."""
    left: dict[nn.Module, deque[Tensor]] = defaultdict(deque)
    for module, output in kept:
        left[module].append(output)
    own = {module: module.__dict__.get("forward") for module in left}

    def replay(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: left[module].popleft().clone() if left[module] else forward(*args, **kwargs)

    try:
        for module in own:
            module.forward = replay(module, module.forward)
        yield
    finally:
        for module, forward in own.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


@dataclass(frozen=True)
class Forward:
    """begins: the share of it, 0 to 1, that is over when each parameter is first needed. Bytes: largest, of the largest
    output of a module; all, of those of modules that have none inside.
    """

    seconds: float
    begins: dict[str, float]
    largest: int
    all: int


def watch(model: nn.Module, parameters: Mapping[str, nn.Parameter], x: Tensor) -> Forward:
    """A forward, looked at. model: in eval mode."""
    first: dict[nn.Module, float] = {}
    sizes: list[tuple[bool, int]] = []

    def enter(module: nn.Module, args: Any) -> None:
        first.setdefault(module, time.perf_counter())

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append((not list(module.children()), output.numel() * output.element_size()))

    with torch.no_grad(), _hooked(model, enter, leave):
        started = time.perf_counter()
        answer(call(model, x)).cpu()
        seconds = time.perf_counter() - started
    begins = dict.fromkeys(parameters, 0.0)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for module, at in first.items():
        for parameter in module.parameters():
            if (name := names.get(id(parameter))) is not None:
                begins[name] = max(begins[name], (at - started) / seconds)
    largest = max((size for _, size in sizes), default=0)
    return Forward(seconds, begins, largest, sum(size for leaf, size in sizes if leaf))


def _versions(args: Any) -> list[int]:
    return [value._version for value in args if isinstance(value, Tensor)]


@contextlib.contextmanager
def _hooked(model: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    handles = [
        handle
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # takes none; it is computed every time
        for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
