"""Operators that move data: views, slices, concatenations. What they do to tensors they do to identities."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.structure.identities import concatenated
from secateur.structure.rules.call import Call, Dims, plain
from secateur.structure.rules.pointwise import broadcast, unknown


def view(call: Call) -> list[Dims]:
    """Row-major reshaping: flattened dimensions are products, and split ones are factors."""
    source, shape = call.args[0], call.outputs[0]
    if call.arg("dtype") is not None and shape != source.shape:  # the same bytes as other numbers
        return unknown(call)
    dims: Dims = [None] * len(shape)
    for inputs, outputs in regrouped(source.shape, shape):
        flat, size = None, 1
        for place in inputs:
            flat = call.ids.product(flat, source.dims[place], (size, source.shape[place]))
            size *= source.shape[place]
        for place in reversed(outputs[1:]):
            flat, dims[place] = call.ids.split(flat, shape[place])
        dims[outputs[0]] = flat
    return [dims]


def regrouped(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of old and new dimensions that hold the same elements; sizes of 1 are left out."""
    left = [place for place, size in enumerate(old) if size != 1]
    right = [place for place, size in enumerate(new) if size != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while left and right:
        one, other = [left.pop(0)], [right.pop(0)]
        a, b = old[one[0]], new[other[0]]
        while a != b and (left if a < b else right):
            if a < b:
                one.append(left.pop(0))
                a *= old[one[-1]]
            else:
                other.append(right.pop(0))
                b *= new[other[-1]]
        groups.append((one, other))
    return groups


def permute(call: Call) -> list[Dims]:
    source, order = call.args[0], call.args[1]
    return [[source.dims[place] for place in order]]


def transpose(call: Call) -> list[Dims]:
    dims = list(call.args[0].dims)
    one, other = (call.args[1], call.args[2]) if len(call.args) > 2 else (0, 1)
    if len(dims) > 1:
        dims[one], dims[other] = dims[other], dims[one]
    return [dims]


def squeeze(call: Call) -> list[Dims]:
    source, shape = call.args[0], call.outputs[0]
    gone = call.arg("dim")
    places = [gone] if isinstance(gone, int) else gone
    places = range(source.ndim) if places is None else [place % max(source.ndim, 1) for place in places]
    dims = [dim for place, dim in enumerate(source.dims) if place not in places or source.shape[place] != 1]
    return [dims if len(dims) == len(shape) else plain(shape)]


def unsqueeze(call: Call) -> list[Dims]:
    dims = list(call.args[0].dims)
    dims.insert(call.args[1] % (len(dims) + 1), None)
    return [dims]


def expand(call: Call) -> list[Dims]:
    """Copies are indices of their own: any of them may go."""
    source, shape = call.args[0], call.outputs[0]
    dims: Dims = [call.ids.new(size) if size > 1 else None for size in shape]
    for place in range(1, source.ndim + 1):
        if source.shape[-place] != 1:
            dims[-place] = source.dims[-place]
    return [dims]


def repeat(call: Call) -> list[Dims]:
    source, times = call.args[0], call.args[1]
    shape = (1,) * (len(times) - source.ndim) + tuple(source.shape)
    old: Dims = [None] * (len(times) - source.ndim) + list(source.dims)
    dims: Dims = []
    for size, dim, count in zip(shape, old, times, strict=True):
        copies = call.ids.new(count) if count > 1 else None
        dims.append(copies if size == 1 else call.ids.product(copies, dim, (count, size)))
    return [dims]


def slice_(call: Call) -> list[Dims]:
    source = call.args[0]
    place, start, end, step = (call.arg("dim", 0), call.arg("start"), call.arg("end"), call.arg("step", 1))
    dims = list(source.dims)
    place %= len(dims)
    dim = dims[place]
    if dim is not None:
        dims[place] = dim[slice(start, end, step)]
    return [dims]


def select(call: Call) -> list[Dims]:
    dims = list(call.args[0].dims)
    place = call.args[1] % len(dims)
    call.protect([dims.pop(place)], "picked by its position")
    return [dims]


def unbind(call: Call) -> list[Dims]:
    dims = list(call.args[0].dims)
    call.protect([dims.pop(call.arg("dim", 0) % len(dims))], "taken apart by position")
    return [list(dims) for _ in call.outputs]


def split(call: Call) -> list[Dims]:
    source = call.args[0]
    place = call.arg("dim", 0) % source.ndim
    start, found = 0, []
    for shape in call.outputs:
        dims, end = list(source.dims), start + shape[place]
        dim = dims[place]
        dims[place] = None if dim is None else dim[start:end]
        found.append(dims)
        start = end
    if source.dims[place] is not None and len({shape[place] for shape in call.outputs}) == 1:
        call.equal_parts.append([dims[place] for dims in found])
    return found


def cat(call: Call) -> list[Dims]:
    parts = [part for part in call.args[0] if part.shape != (0,)]
    place, dims = call.arg("dim", 0), list(parts[0].dims)
    place %= len(dims)
    for other in parts[1:]:
        for index, dim in enumerate(other.dims):
            if index != place:
                call.ids.same(dims[index], dim)
                dims[index] = None if dim is None else dims[index]
    dims[place] = concatenated(call.ids, [p.dims[place] for p in parts], [p.shape[place] for p in parts])
    return [dims]


def stack(call: Call) -> list[Dims]:
    parts, place = call.args[0], call.arg("dim", 0)
    merged = [broadcast(call.ids, parts, parts[0].shape, -index) for index in range(parts[0].ndim, 0, -1)]
    merged.insert(place % (len(merged) + 1), None)
    return [merged]


def flip(call: Call) -> list[Dims]:
    source = call.args[0]
    dims = list(source.dims)
    for place in call.args[1]:
        dim = dims[place]
        dims[place] = None if dim is None else dim[::-1].copy()
    return [dims]


def roll(call: Call) -> list[Dims]:
    source, places = call.args[0], call.arg("dims", ())
    call.protect([source.dims[place] for place in places] if places else source.dims, "rolled by a number of places")
    return [[None if not places or i in [p % source.ndim for p in places] else d for i, d in enumerate(source.dims)]]


def pad(call: Call) -> list[Dims]:
    """Padded dimensions stay as they are: the pairs of numbers count from the last dimension."""
    source, amounts = call.args[0], call.args[1]
    dims = list(source.dims)
    for pair in range(len(amounts) // 2):
        place = -1 - pair
        if amounts[2 * pair] or amounts[2 * pair + 1]:
            before, after = amounts[2 * pair], amounts[2 * pair + 1]
            parts = [None, dims[place], None]
            if before < 0 or after < 0:
                call.protect([dims[place]], "cropped by a number of places")
                dims[place] = None
            else:
                dims[place] = concatenated(call.ids, parts, [before, source.shape[place], after])
    return [dims]


def diagonal(call: Call) -> list[Dims]:
    dims = list(call.args[0].dims)
    one, other = (place % len(dims) for place in (call.arg("dim1", 0), call.arg("dim2", 1)))
    call.protect([dims[one], dims[other]], "a diagonal is taken over it")
    return [[dim for place, dim in enumerate(dims) if place not in (one, other)] + [None]]


def as_strided(call: Call) -> list[Dims]:
    """Followed where it changes nothing."""
    source, shape, strides = call.args[0], call.outputs[0], call.args[2]
    same = [(a, b) for size, a, b in zip(shape, strides, source.strides, strict=False) if size != 1]
    if shape == source.shape and all(a == b for a, b in same):
        return [list(source.dims)]
    return unknown(call)


def as_complex(call: Call) -> list[Dims]:
    call.protect(call.args[0].dims[-1:], "real and imaginary parts")
    return [list(call.args[0].dims[:-1])]


def as_real(call: Call) -> list[Dims]:
    return [[*call.args[0].dims, None]]


def pixel_shuffle(call: Call) -> list[Dims]:
    """[.., c r r, h, w] -> [.., c, h r, w r]: the r r values of a channel go together."""
    x, factor = call.args[0], call.args[1]
    call.protect(x.dims[-2:], "space")
    channels, inside = call.ids.split(x.dims[-3], factor * factor)
    call.protect([inside], "it is spread over space")
    return [[*x.dims[:-3], channels, None, None]]


def channel_shuffle(call: Call) -> list[Dims]:
    """[.., groups x inside, ..] -> [.., inside x groups, ..]."""
    x, groups = call.args[0], call.args[1]
    inside = x.shape[1] // groups
    group, member = call.ids.split(x.dims[1], inside)
    return [[x.dims[0], call.ids.product(member, group, (inside, groups)), *x.dims[2:]]]


def pixel_unshuffle(call: Call) -> list[Dims]:
    x, factor = call.args[0], call.args[1]
    call.protect(x.dims[-2:], "space")
    return [[*x.dims[:-3], call.ids.product(x.dims[-3], None, (x.shape[-3], factor * factor)), None, None]]


def gated_halves(call: Call) -> list[Dims]:
    """glu: the first half times the sigmoid of the second."""
    x = call.args[0]
    dims, place = list(x.dims), call.arg("dim", -1)
    if (dim := dims[place]) is not None:
        half = len(dim) // 2
        call.ids.same(dim[:half], dim[half:])
        dims[place] = dim[:half]
    return [dims]


def unfold(call: Call) -> list[Dims]:
    dims = list(call.args[0].dims)
    place = call.args[1] % len(dims)
    call.protect([dims[place]], "windows slide over it")
    dims[place] = None
    return [[*dims, None]]
