"""Norms, reductions, softmax, pooling: operators along a dimension."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.structure.rules.call import Call, Dims, plain
from secateur.structure.rules.pointwise import elementwise


def batch_norm(call: Call) -> list[Dims]:
    """A statistic for each channel: removal is exact."""
    x = call.args[0]
    for other in call.operands[1:]:
        call.ids.same(x.dims[1], other.dims[0])
    return [list(x.dims), *(plain(shape) for shape in call.outputs[1:])]


def layer_norm(call: Call) -> list[Dims]:
    x, shape = call.args[0], call.args[1]
    for other in call.operands[1:]:
        for place in range(1, len(shape) + 1):
            call.ids.same(x.dims[-place], other.dims[-place])
    call.reductions += x.dims[-len(shape) :]
    return [list(x.dims), *(plain(out) for out in call.outputs[1:])]


def group_norm(call: Call) -> list[Dims]:
    """Mean and variance over the channels of a group: as many have to stay in each. Where the groups are an axis of their
    own, such as heads, whole ones may go, and their number follows.
    """
    x, groups = call.args[0], call.args[6]
    channels = x.dims[1]
    for other in call.operands[1:]:
        call.ids.same(channels, other.dims[0])
    grid = None if channels is None else call.ids.grid(channels, len(channels) // groups)
    if grid is not None:
        call.sizes["groups"], inner = grid
        call.reductions.append(inner)
    elif channels is not None:
        call.equal_parts.append(list(channels.reshape(groups, -1)))
        call.reductions.append(channels)
    return [list(x.dims), *(plain(out) for out in call.outputs[1:])]


def reduction(call: Call) -> list[Dims]:
    """Sums, means and norms: removed elements are no longer counted."""
    source, gone = call.args[0], _gone(call)
    call.reductions += [source.dims[place] for place in gone]
    return [without(source.dims, gone, shape) for shape in call.outputs]


def largest(call: Call) -> list[Dims]:
    """Maxima and minima: they run over what remains, and the place of one, as soon as it is read, binds all."""
    if len(call.operands) > 1:
        return elementwise(call)
    source, gone = call.args[0], _gone(call)
    over = [source.dims[place] for place in gone]
    call.reductions += over
    if call.name in ("aten.max", "aten.min") and len(call.outputs) > 1:
        call.when_read[1] = (over, f"the place of {call.name} is read")
    return [without(source.dims, gone, shape) for shape in call.outputs]


def extreme(call: Call) -> list[Dims]:
    """Products, orders, places of maxima: what is removed might have been the answer."""
    source, gone = call.args[0], _gone(call)
    call.protect([source.dims[place] for place in gone], f"{call.name} compares or chains its elements")
    return [without(source.dims, gone, shape) for shape in call.outputs]


def _gone(call: Call) -> Sequence[int]:
    """The dimensions that are reduced over: those that are named, or all."""
    places, ndim = call.arg("dim"), call.args[0].ndim
    places = [places] if isinstance(places, int) else places
    return [place % ndim for place in places] if places else range(ndim)


def without(dims: Dims, gone: Sequence[int], shape: Sequence[int]) -> Dims:
    left = [None if place in gone else dim for place, dim in enumerate(dims)]
    if len(shape) == len(left):
        return left
    left = [dim for place, dim in enumerate(dims) if place not in gone]
    return left if len(shape) == len(left) else plain(shape)


def chained(call: Call) -> list[Dims]:
    """Softmax, cumulative sums, sorting: the elements along a dimension need each other; shapes stay."""
    source, place = call.args[0], call.arg("dim", -1)
    call.protect([source.dims[place]], f"{call.name} runs over it")
    dims = [None if index == place % source.ndim else dim for index, dim in enumerate(source.dims)]
    return [dims if len(shape) == source.ndim else plain(shape) for shape in call.outputs]


def transformed(call: Call) -> list[Dims]:
    """Fourier transforms: every output needs every input along their dimensions; the others stay."""
    x = call.args[0]
    places = {place % x.ndim for place in call.args[1]}
    call.protect([x.dims[place] for place in places], "a Fourier transform runs over it")
    return [[None if place in places else dim for place, dim in enumerate(x.dims)]]


def spatial(call: Call) -> list[Dims]:
    """Pooling, resampling: the first two dimensions are batch and channels, the others change."""
    x = call.args[0]
    left = x.ndim - spatial_dims(call.name)
    call.protect(x.dims[left:], f"space of {call.name}")
    return [[*x.dims[:left], *plain(shape[left:])] for shape in call.outputs]


def spatial_dims(name: str) -> int:
    return next((n for n in (3, 2, 1) if f"{n}d" in name), 2)
