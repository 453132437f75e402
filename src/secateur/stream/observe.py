"""See what every weight of a block is multiplied with, whatever code does the multiplying.

A `TorchDispatchMode` watches matrix products and convolutions for operands whose memory lies inside a watched
parameter. That covers modules, functional calls, raw use of `.weight`, fused attention projections and stacked experts.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.weights.stats import Inputs

aten = torch.ops.aten


@dataclass(frozen=True)
class Watched:
    """A parameter, and the names of its matrices: one, or one per expert of a 3-D parameter (the leading dimension)."""

    parameter: Tensor
    names: Sequence[str]


class Diverged(Exception):
    """Two layers that shared an input stopped doing so; collect again with sharing off."""


class Observer(TorchDispatchMode):
    """Collects `Inputs` per matrix name while it is active. Call `next_call` before each call of the block.

    Layers fed by the same tensor share one `Inputs`. transposed[name] tells where a matrix was used as x @ w, i.e. its
    last dimension is the output.
    """

    def __init__(self, watched: Iterable[Watched], gram: bool, share: bool = True) -> None:
        super().__init__()
        self.inputs: dict[str, Inputs] = {}
        self.transposed: dict[str, bool] = {}
        # used in parts, in another shape or both ways: what was seen is not what they are fed
        self.unclear: set[str] = set()
        self.gram, self.share = gram, share
        self._ranges = sorted(
            ((w.parameter.data_ptr(), w.parameter.nbytes, w) for w in watched if w.parameter.numel()),
            key=lambda entry: entry[0],
        )
        self._starts = [start for start, _, _ in self._ranges]
        self._members: dict[int, list[str]] = {}  # id of Inputs -> layers, in the order they came
        self._seen: list[tuple[Any, Tensor, Inputs]] = []  # of this call: (key, tensor kept alive, where it went)
        self._counts: dict[str, int] = {}
        self._created: set[int] = set()

    def next_call(self) -> None:
        """Close the current call of the block; raises Diverged when sharing turned out to be wrong."""
        for members in self._members.values():
            if len({self._counts.get(name, 0) for name in members}) > 1:
                raise Diverged
        self._seen.clear()
        self._counts.clear()
        self._created.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        look = _LOOKS.get(func)
        if look is not None:
            look(self, *args)
        return func(*args, **(kwargs or {}))

    def _find(self, operand: Tensor) -> tuple[Watched, int] | None:
        """The watched parameter that holds the operand's memory, and the operand's offset in it, in bytes."""
        pointer = operand.data_ptr()
        index = bisect.bisect_right(self._starts, pointer) - 1
        if index < 0:
            return None
        start, size, watched = self._ranges[index]
        return (watched, pointer - start) if pointer < start + size else None

    def product(self, left: Tensor, right: Tensor) -> None:
        """left [n, k] @ right [k, m], or both with a batch dimension in front."""
        for operand, other, weight_is_left in ((right, left, False), (left, right, True)):
            found = self._find(operand)
            if found is None:
                continue
            x = other.mT if weight_is_left else other  # [..., tokens, in]
            contraction = operand.stride(-1 if weight_is_left else -2)
            self._record(found, operand, x, contraction != 1, other._version)
            return

    def grouped(self, left: Tensor, right: Tensor, ends: Tensor | None) -> None:
        """Tokens sorted by expert: left [n, k], right [experts, k, m], ends: where each expert's tokens end."""
        found = self._find(right)
        if found is None or ends is None or left.ndim != 2 or right.ndim != 3:
            return
        start = 0
        for index, end in enumerate(ends.tolist()):
            offset = found[1] + index * right.stride(0) * right.element_size()
            self._record((found[0], offset), right[index], left[start:end], right.stride(-2) != 1, left._version)
            start = end

    def _record(self, found: tuple[Watched, int], operand: Tensor, x: Tensor, transposed: bool, version: int) -> None:
        watched, offset = found
        names, parameter = watched.names, watched.parameter
        stacked = len(names) > 1
        member = parameter[0] if stacked else parameter
        first = offset // (member.numel() * member.element_size()) if stacked else 0
        width = member.shape[0] if transposed else member[0].numel()
        whole = operand.shape[-2:].numel() == member.numel() or not stacked
        if x.shape[-1] != width or not whole:
            self.unclear.update(names)
        elif stacked and operand.ndim == 3:
            for index in range(operand.shape[0]):
                self._add(names[first + index], x[index][None], transposed, version)
        else:
            self._add(names[first], x.reshape(1, -1, x.shape[-1]), transposed, version)

    def convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Any,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Any,
        groups: int,
    ) -> None:
        found = self._find(weight)
        if found is None or transposed:
            return
        if weight.numel() != found[0].parameter.numel():
            self.unclear.update(found[0].names)
            return
        for sample in x.split(max(1, (1 << 22) // max(1, x[0].numel() * weight[0, 0].numel()))):
            patches = unfold(sample, weight.shape[2:], stride, padding, dilation, groups)
            self._add(found[0].names[0], patches, False)

    def _add(self, name: str, x: Tensor, transposed: bool, version: int | None = None) -> None:
        """x: [groups, tokens, in]. version: of the tensor that x is a view of; x itself, made in here, does not count
        the changes in place. None: x was computed, and nobody can share it.
        """
        if self.transposed.setdefault(name, transposed) != transposed:
            self.unclear.add(name)
        if x.shape[1] == 0 or name in self.unclear:
            return
        self._counts[name] = self._counts.get(name, 0) + 1
        mine = self.inputs.get(name)
        key = (x.data_ptr(), x.shape, x.stride(), version)
        shared = self.share and version is not None
        known = next((into for k, _, into in self._seen if k == key), None) if shared else None
        if mine is None:
            joins = known is not None and id(known) in self._created
            mine = known if joins and known is not None else Inputs()
            self.inputs[name] = mine
            self._members.setdefault(id(mine), []).append(name)
            if joins:
                return
            self._created.add(id(mine))
        elif known is mine:
            return
        elif self._members[id(mine)][0] != name:
            raise Diverged
        self._seen.append((key, x, mine))
        mine.add(x, self.gram)


def _look_mm(observer: Observer, left: Tensor, right: Tensor, *_: Any) -> None:
    observer.product(left, right)


def _look_addmm(observer: Observer, bias: Tensor, left: Tensor, right: Tensor, *_: Any) -> None:
    observer.product(left, right)


def _look_mv(observer: Observer, matrix: Tensor, vector: Tensor, *_: Any) -> None:
    observer.product(matrix, vector[:, None])


def _look_grouped(observer: Observer, left: Tensor, right: Tensor, ends: Tensor | None = None, *_: Any) -> None:
    observer.grouped(left, right, ends)


_LOOKS: dict[Any, Callable[..., None]] = {
    aten.mm.default: _look_mm,
    aten.bmm.default: _look_mm,
    aten.addmm.default: _look_addmm,
    aten.baddbmm.default: _look_addmm,
    aten.mv.default: _look_mv,
    aten._grouped_mm.default: _look_grouped,
    aten.convolution.default: Observer.convolution,
}


def unfold(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The patches that a convolution multiplies: x [n, channels, *space] -> [groups, n * places, channels/groups * k]."""
    pads = [amount for p in reversed(list(padding)) for amount in (p, p)]
    x = nn.functional.pad(x, pads)
    for dim, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
    n, channels, spatial = x.shape[0], x.shape[1], len(kernel)
    x = x.reshape(n, groups, channels // groups, *x.shape[2:])
    places, taps = range(3, 3 + spatial), range(3 + spatial, 3 + 2 * spatial)
    x = x.permute(1, 0, *places, 2, *taps)  # [groups, n, *places, channels/groups, *kernel]
    return x.reshape(groups, -1, x.shape[2 + spatial :].numel())


def collect(
    run: Callable[[], Iterable[int]], watched: Sequence[Watched], gram: bool
) -> tuple[dict[str, Inputs], dict[str, bool]]:
    """Inputs per matrix name, and which matrices were used transposed. `run()` calls the block once per item.

    A matrix that is used in ways that are not understood has no inputs.
    """
    for share in (True, False):
        observer = Observer(watched, gram, share)
        try:
            with observer, _no_fused_attention():
                for _ in run():
                    observer.next_call()
            found = {name: seen for name, seen in observer.inputs.items() if name not in observer.unclear}
            for inputs in found.values():
                inputs.complete()
            return found, observer.transposed
        except Diverged:
            continue
    raise AssertionError("unreachable: without sharing nothing diverges")


@contextlib.contextmanager
def _no_fused_attention() -> Iterator[None]:
    """torch's own attention modules may run as one fused operator, in which no product is seen."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def make_observable(model: Any) -> Callable[[], None]:
    """Have a transformers model multiply stacked experts one by one, so that each one's inputs can be seen, and keep no
    cache, to which a block called twice would append twice. No weight of any module asks for gradients meanwhile: some
    products are computed in another order where one does, and results would differ in the last digits from those of a
    checkpoint. Returns what undoes it.
    """
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    known: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in known if getattr(config, "use_cache", False)}
    for config in configs.values():
        config.use_cache = False
    experts = model.get_experts_implementation() if hasattr(model, "get_experts_implementation") else None
    with contextlib.suppress(AttributeError, KeyError, ValueError, RuntimeError):
        model.set_experts_implementation("eager")

    def undo() -> None:
        for parameter in learned:
            parameter.requires_grad_(True)
        for config in configs.values():
            config.use_cache = True
        if experts is not None:
            model.set_experts_implementation(experts)

    return undo
