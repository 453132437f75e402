"""What modules return on the way to the output: there a wrong cut shows even behind a gate that is nearly closed on these
inputs, or where the output is a choice that stays the same.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from secateur.structure.watch import floats_of

LEAST, ROUNDING = 1e-6, 1e5  # smaller tensors count as this part of the largest number, or so many roundings of it
UNDRAWN = torch.Generator().manual_seed(0).get_state()  # of the random numbers, as every run starts


@dataclass(frozen=True)
class Sketch:
    """A tensor in short. sums: over all elements, with two sets of weights, divided by the root of their number; hardly
    equal where the tensors are not. rounding: of its numbers, relative.
    """

    shape: tuple[int, ...]
    largest: float
    sums: tuple[float, float]
    rounding: float


Sketches = Mapping[str, Sequence[Sketch]]


@contextlib.contextmanager
def sketched(model: nn.Module, narrowed: Callable[[str, int, Tensor], Tensor] | None = None) -> Iterator[Sketches]:
    """Name of a module -> what it returns, call by call, while the model runs and until it draws a random number: noise of
    another shape is other noise. narrowed: what to look at of a tensor, given the module and how many it returned before.
    """
    names = {module: name for name, module in model.named_modules() if name and _tells(module)}
    found: dict[str, list[Sketch]] = {}

    def keep(module: nn.Module, args: object, output: object) -> None:
        if module not in names:
            return
        with _disable_current_modes(), torch.no_grad():
            if torch.equal(torch.get_rng_state(), UNDRAWN):
                own = found.setdefault(names[module], [])
                for tensor in floats_of(output):
                    if tensor.device.type != "meta" and not isinstance(tensor, FakeTensor):
                        own.append(_sketch(narrowed(names[module], len(own), tensor) if narrowed else tensor))

    handle = torch.nn.modules.module.register_module_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _tells(module: nn.Module) -> bool:
    """Not an activation or a pool, nor a sequence of modules: what they return follows from what others do."""
    return bool(module._parameters or module._modules) and not isinstance(module, nn.Sequential)


def _sketch(tensor: Tensor) -> Sketch:
    left, rounding = tensor.detach().to_dense().double(), torch.finfo(tensor.dtype).eps
    if not left.numel():
        return Sketch(tuple(tensor.shape), 0.0, (0.0, 0.0), rounding)
    largest = float(torch.linalg.vector_norm(left, math.inf))
    left = left[None] if left.ndim == 0 else left
    left = left @ _waves(left.shape[-1], left.device)
    while left.ndim > 1:
        left = (left * _waves(left.shape[-2], left.device)).sum(-2)
    size = math.sqrt(tensor.numel())
    return Sketch(tuple(tensor.shape), largest, (float(left[0]) / size, float(left[1]) / size), rounding)


@functools.lru_cache(64)
def _waves(count: int, device: torch.device) -> Tensor:
    """Two weights for each index: [count, 2]."""
    places = torch.arange(count, dtype=torch.float64, device=device)
    return torch.stack([torch.cos(places), torch.sin(places * 1.7 + 1)], 1)


def farthest(want: Sketches, got: Sketches) -> tuple[float, str]:
    """The largest difference of sums, relative to the largest element, among tensors of the same shape, and the module that
    returns it.
    """
    worst, where = 0.0, ""
    most = max((s.largest for own in want.values() for s in own if math.isfinite(s.largest)), default=0.0)
    for name, own in want.items():
        others = got.get(name, ())
        if len(own) != len(others):
            continue  # another path through the model: routing, loops over what is there
        for one, other in zip(own, others, strict=True):
            if one.shape == other.shape and (apart := _apart(one, other, most)) > worst:
                worst, where = apart, name
    return worst, where


def _apart(want: Sketch, got: Sketch, most: float) -> float:
    if not math.isfinite(want.largest):
        return 0.0  # what is masked with infinities
    apart = max(abs(a - b) for a, b in zip(want.sums, got.sums, strict=True))
    if not math.isfinite(apart):
        return math.inf
    return apart and apart / max(want.largest, most * max(LEAST, min(ROUNDING * want.rounding, 1.0)), 1e-300)
