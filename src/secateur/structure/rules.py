"""What every ATen operator does with the indices of its operands: one row of RULES for each operator.

A rule takes the identities, the operands as `Seen` (a tensor's shape and dimensions) and returns the dimensions of its
outputs. An operator without a row protects all that it touches, so that nothing is ever removed on a guess. Add one: write
the rule, or choose one that is there, and add a row; tests/structure/test_rules.py has a table to match.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.structure.identities import Dim, Identities, concatenated

Dims = list[Dim]


@dataclass
class Seen:
    """A tensor's shape, and the identities of its indices, dimension by dimension."""

    shape: tuple[int, ...]
    dims: Dims
    strides: tuple[int, ...] = ()

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates: a constant times the sizes of dimensions."""

    constant: int
    dims: tuple[Dim, ...]

    @staticmethod
    def over(*sizes: tuple[int, Dim]) -> Work:
        """The product of sizes, each with its dimension."""
        return Work(math.prod(n for n, dim in sizes if dim is None), tuple(d for _, d in sizes if d is not None))


@dataclass
class Call:
    """A call of an operator: operands with tensors as `Seen`, and the shapes of its outputs."""

    ids: Identities
    name: str
    args: tuple[Any, ...]
    named: dict[str, Any]
    outputs: list[tuple[int, ...]]
    equal_parts: list[list[Dim]]  # parts of which equally many indices have to stay
    reductions: list[Dim]  # dimensions over which a mean or a norm is taken
    sizes: dict[str, Dim]  # integers among the arguments that count the indices of a dimension
    work: list[Work]  # multiplications, as products of sizes

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema; the default where it was not given."""
        found = self.named.get(name)
        return default if found is None else found

    @property
    def operands(self) -> list[Seen]:
        """All tensors among the arguments, lists of tensors included."""
        found: list[Seen] = []
        for value in self.named.values():
            found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Seen)]
        return found

    def protect(self, dims: Sequence[Dim], reason: str) -> None:
        """No index of these dimensions may be removed."""
        for dim in dims:
            self.ids.protect(dim, reason)


Rule = Callable[[Call], list[Dims]]


# Rules for many operators


def elementwise(call: Call) -> list[Dims]:
    """Operands and output broadcast: what stands at the same place is the same."""
    shape = call.outputs[0]
    merged = [broadcast(call.ids, call.operands, shape, -place) for place in range(len(shape), 0, -1)]
    return [list(merged) if out == shape else _plain(out) for out in call.outputs]


def broadcast(ids: Identities, operands: Sequence[Seen], shape: Sequence[int], place: int) -> Dim:
    """The dimension at a (negative) place of operands that broadcast to a shape."""
    here = [seen.dims[place] for seen in operands if seen.ndim >= -place and seen.shape[place] == shape[place]]
    for other in here[1:]:
        ids.same(here[0], other)
    return None if not here or any(dim is None for dim in here) else here[0]


def broadcast_all(ids: Identities, operands: Sequence[Seen]) -> None:
    """State what broadcasting to the first operand's shape says."""
    shape = operands[0].shape
    for place in range(1, len(shape) + 1):
        broadcast(ids, operands, shape, -place)


def unary(call: Call) -> list[Dims]:
    """Outputs of the first operand's shape have its dimensions; other outputs have none of interest."""
    first = call.operands[0]
    return [list(first.dims) if shape == first.shape else _plain(shape) for shape in call.outputs]


def created(call: Call) -> list[Dims]:
    """A constant tensor: its sizes follow whatever it meets."""
    return [[call.ids.new(size) if size > 1 else None for size in shape] for shape in call.outputs]


def constant(call: Call) -> list[Dims]:
    """A tensor whose values depend on their places, or that reads values: nothing can be removed."""
    for operand in call.operands:
        call.protect(operand.dims, f"{call.name} reads its values")
    return [_plain(shape) for shape in call.outputs]


def unknown(call: Call) -> list[Dims]:
    """Whatever it does, nothing that it touches is removed."""
    for operand in call.operands:
        call.protect(operand.dims, f"{call.name}: no rule for this operator")
    return [_plain(shape) for shape in call.outputs]


def _plain(shape: Sequence[int]) -> Dims:
    return [None] * len(shape)


# Views


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
    return [dims if len(dims) == len(shape) else _plain(shape)]


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


# Products


def matmul(call: Call) -> list[Dims]:
    """[.., n, k] @ [.., k, m], and addmm's and baddbmm's bias in front."""
    operands = call.operands
    a, b = operands[-2:]
    sizes = list(zip(a.shape, a.dims, strict=True))
    call.work.append(Work.over(*sizes, *([(b.shape[-1], b.dims[-1])] if b.ndim > 1 else [])))
    call.ids.same(a.dims[-1], b.dims[-2] if b.ndim > 1 else b.dims[-1])
    if a.ndim == 3 and b.ndim == 3:
        call.ids.same(a.dims[0], b.dims[0])
    dims: Dims = [a.dims[0] if b.dims[0] is not None else None] if a.ndim == 3 and b.ndim == 3 else []
    dims += [a.dims[-2]] if a.ndim > 1 else []
    dims += [b.dims[-1]] if b.ndim > 1 else []
    if len(operands) > 2:
        shape = call.outputs[0]
        both = [operands[0], Seen(shape, dims)]
        dims = [broadcast(call.ids, both, shape, -place) for place in range(len(shape), 0, -1)]
    return [dims]


def linear(call: Call) -> list[Dims]:
    x, weight, bias = call.args[0], call.args[1], call.arg("bias")
    call.work.append(Work.over(*zip(x.shape, x.dims, strict=True), (weight.shape[0], weight.dims[0])))
    call.ids.same(x.dims[-1], weight.dims[1])
    if bias is not None:
        call.ids.same(weight.dims[0], bias.dims[0])
    return [[*x.dims[:-1], weight.dims[0]]]


def convolution(call: Call) -> list[Dims]:
    x, weight, bias = call.args[:3]
    transposed, groups = bool(call.args[6]), int(call.args[8])
    call.protect(weight.dims[2:], "the window of a convolution")
    call.protect(x.dims[2:], "space of a convolution")
    places = call.outputs[0] if not transposed else x.shape
    constant = math.prod((places[0], *places[2:]))
    call.work.append(Work.over((constant, None), *zip(weight.shape, weight.dims, strict=True)))
    if groups == 1:
        call.ids.same(x.dims[1], weight.dims[0 if transposed else 1])
        out = weight.dims[1 if transposed else 0]
    else:
        out = _grouped(call, x, weight, groups, transposed)
    if bias is not None:
        call.ids.same(out, bias.dims[0])
    return [[x.dims[0], out, *_plain(call.outputs[0][2:])]]


def _grouped(call: Call, x: Seen, weight: Seen, groups: int, transposed: bool) -> Dim:
    """Groups are a factor of the channels; the inputs of a group are the other."""
    ids = call.ids
    group, inside = ids.split(x.dims[1], x.shape[1] // groups)
    if transposed:
        ids.same(x.dims[1], weight.dims[0])
        out = ids.product(group, weight.dims[1], (groups, weight.shape[1]))
    else:
        ids.same(inside, weight.dims[1])
        ids.same(group, ids.split(weight.dims[0], weight.shape[0] // groups)[0])
        group = ids.split(weight.dims[0], weight.shape[0] // groups)[0]
        out = weight.dims[0]
    call.sizes["groups"] = group
    return out


def attention(call: Call) -> list[Dims]:
    """softmax(q k') v: [batch, heads, tokens, head size]."""
    q, k, v = call.args[:3]
    both = [*zip(q.shape[:3], q.dims[:3], strict=True), (k.shape[2], None)]
    call.work += [Work.over(*both, (q.shape[3], q.dims[3])), Work.over(*both, (v.shape[3], v.dims[3]))]
    for one, other in ((q, k), (q, v)):
        call.ids.same(one.dims[0], other.dims[0])
    call.ids.same(k.dims[1], v.dims[1])
    if q.shape[1] == k.shape[1]:
        call.ids.same(q.dims[1], k.dims[1])
    else:
        call.ids.same(k.dims[1], call.ids.split(q.dims[1], q.shape[1] // k.shape[1])[0])
    call.ids.same(q.dims[3], k.dims[3])
    if call.arg("scale") is None:
        call.protect([q.dims[3]], "the scale of attention follows from the size of a head")
    call.protect([k.dims[2], v.dims[2]], "tokens")
    mask = call.arg("attn_mask") or call.arg("attn_bias")
    if mask is not None:
        broadcast_all(call.ids, [Seen((*q.shape[:3], k.shape[2]), [*q.dims[:3], None]), mask])
    return [[*q.dims[:3], v.dims[3]], *(_plain(shape) for shape in call.outputs[1:])]


def trilinear(call: Call) -> list[Dims]:
    """Three operands, each with dimensions put in at places of its own, multiplied and summed (nn.Bilinear)."""
    wide = []
    for operand, places in zip(call.args[:3], call.args[3:6], strict=True):
        shape, dims = list(operand.shape), list(operand.dims)
        for place in sorted(places):
            shape.insert(place, 1)
            dims.insert(place, None)
        wide.append(Seen(tuple(shape), dims))
    shape = tuple(max(sizes) for sizes in zip(*(operand.shape for operand in wide), strict=True))
    merged = [broadcast(call.ids, wide, shape, place - len(shape)) for place in range(len(shape))]
    return [[dim for place, dim in enumerate(merged) if place not in call.args[6]]]


def grouped_matmul(call: Call) -> list[Dims]:
    """Rows [tokens, k], sorted by group, times the group's matrix [groups, k, m]."""
    x, weight = call.args[0], call.args[1]
    call.work.append(Work.over(*zip(x.shape, x.dims, strict=True), (weight.shape[-1], weight.dims[-1])))
    call.ids.same(x.dims[-1], weight.dims[-2])
    if weight.ndim == 3:
        call.protect([weight.dims[0]], "groups are looked up by number")
    return [[None if dim is None else dim for dim in x.dims[:-1]] + [weight.dims[-1]]]


def weight_norm(call: Call) -> list[Dims]:
    """g v / ||v||: a row's norm runs over all that is not its own index."""
    v, g, own = call.args[0], call.args[1], call.arg("dim", 0)
    for place, dim in enumerate(v.dims):
        if place == own % v.ndim:
            call.ids.same(dim, g.dims[place])
        else:
            way_out = "remove it first: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
            call.protect([dim], f"weight norm divides by a norm over it; {way_out}")
    return [list(v.dims), list(g.dims)]


def columns(call: Call) -> list[Dims]:
    """im2col: [batch, channels, h, w] -> [batch, channels * window, places]."""
    x, shape = call.args[0], call.outputs[0]
    flat = call.ids.product(x.dims[1], None, (x.shape[1], shape[1] // x.shape[1]))
    return [[x.dims[0], flat, None]]


def masked_scatter(call: Call) -> list[Dims]:
    """Rows of the source take the places that a mask names."""
    x, source = call.args[0], call.args[2]
    if x.shape[-1] == source.shape[-1]:
        call.ids.same(x.dims[-1], source.dims[-1])
        call.protect([*x.dims[:-1], *source.dims[:-1]], "entries are written by number")
        return [list(x.dims)]
    return unknown(call)


def outer(call: Call) -> list[Dims]:
    return [[call.args[0].dims[0], call.args[1].dims[0]]]


# Norms and reductions


def batch_norm(call: Call) -> list[Dims]:
    """A statistic for each channel: removal is exact."""
    x = call.args[0]
    for other in call.operands[1:]:
        call.ids.same(x.dims[1], other.dims[0])
    return [list(x.dims), *(_plain(shape) for shape in call.outputs[1:])]


def layer_norm(call: Call) -> list[Dims]:
    x, shape = call.args[0], call.args[1]
    for other in call.operands[1:]:
        for place in range(1, len(shape) + 1):
            call.ids.same(x.dims[-place], other.dims[-place])
    call.reductions += x.dims[-len(shape) :]
    return [list(x.dims), *(_plain(out) for out in call.outputs[1:])]


def group_norm(call: Call) -> list[Dims]:
    """Mean and variance over the channels of a group: as many have to stay in each."""
    x, groups = call.args[0], call.args[6]
    channels = x.dims[1]
    for other in call.operands[1:]:
        call.ids.same(channels, other.dims[0])
    if channels is not None:
        call.equal_parts.append(list(channels.reshape(groups, -1)))
        call.reductions.append(channels)
    return [list(x.dims), *(_plain(out) for out in call.outputs[1:])]


def reduction(call: Call) -> list[Dims]:
    """Sums and means: removed elements are no longer counted."""
    source, places = call.args[0], call.arg("dim")
    places = [places] if isinstance(places, int) else places
    gone = range(source.ndim) if places is None or not len(places) else [place % source.ndim for place in places]
    call.reductions += [source.dims[place] for place in gone]
    return [_without(source.dims, gone, shape) for shape in call.outputs]


def norm(call: Call) -> list[Dims]:
    """A p-norm: its dimensions come after p."""
    source = call.args[0]
    places = call.arg("dim")
    places = [places] if isinstance(places, int) else places
    gone = range(source.ndim) if places is None or not len(places) else [place % source.ndim for place in places]
    call.reductions += [source.dims[place] for place in gone]
    return [_without(source.dims, gone, shape) for shape in call.outputs]


def extreme(call: Call) -> list[Dims]:
    """Maxima, products, orders: what is removed might have been the answer."""
    source, place = call.args[0], call.arg("dim")
    places = [place] if isinstance(place, int) else place
    gone = range(source.ndim) if places is None or not len(places) else [place % source.ndim for place in places]
    call.protect([source.dims[place] for place in gone], f"{call.name} compares or chains its elements")
    return [_without(source.dims, gone, shape) for shape in call.outputs]


def _without(dims: Dims, gone: Sequence[int], shape: Sequence[int]) -> Dims:
    left = [None if place in gone else dim for place, dim in enumerate(dims)]
    if len(shape) == len(left):
        return left
    left = [dim for place, dim in enumerate(dims) if place not in gone]
    return left if len(shape) == len(left) else _plain(shape)


def chained(call: Call) -> list[Dims]:
    """Softmax, cumulative sums, sorting: the elements along a dimension need each other; shapes stay."""
    source, place = call.args[0], call.arg("dim", -1)
    call.protect([source.dims[place]], f"{call.name} runs over it")
    dims = [None if index == place % source.ndim else dim for index, dim in enumerate(source.dims)]
    return [dims if len(shape) == source.ndim else _plain(shape) for shape in call.outputs]


def spatial(call: Call) -> list[Dims]:
    """Pooling, resampling: the first two dimensions are batch and channels, the others change."""
    x = call.args[0]
    left = x.ndim - _spatial_dims(call.name)
    call.protect(x.dims[left:], f"space of {call.name}")
    return [[*x.dims[:left], *_plain(shape[left:])] for shape in call.outputs]


def _spatial_dims(name: str) -> int:
    return next((n for n in (3, 2, 1) if f"{n}d" in name), 2)


# Indices


def embedding(call: Call) -> list[Dims]:
    table, places = call.args[0], call.args[1]
    call.protect([table.dims[0]], "rows are looked up by number")
    return [[*places.dims, *table.dims[1:]]]


def gather(call: Call) -> list[Dims]:
    source, place = call.args[0], call.args[1] % call.args[0].ndim
    call.protect([source.dims[place]], "entries are looked up by number")
    index = call.args[2]
    call.protect(index.dims, "numbers to look up")
    dims: Dims = []
    for other, dim in enumerate(source.dims):
        whole = other != place and index.shape[other] == source.shape[other]
        if not whole:
            call.protect([dim], "entries are looked up by number")
        dims.append(dim if whole else None)
    return [dims]


def index_select(call: Call) -> list[Dims]:
    source, place = call.args[0], call.args[1] % call.args[0].ndim
    call.protect([source.dims[place]], "entries are looked up by number")
    return [[None if other == place else dim for other, dim in enumerate(source.dims)]]


def index(call: Call) -> list[Dims]:
    """x[i, :, j]: indexed dimensions are replaced by those of the indices, in place or in front."""
    source, places = call.args[0], list(call.args[1])
    used = [place for place, tensor in enumerate(places) if tensor is not None]
    call.protect([source.dims[place] for place in used], "entries are looked up by number")
    for tensor in places:
        call.protect([] if tensor is None else tensor.dims, "numbers to look up")
    shape = call.outputs[0]
    taken = len(shape) - (source.ndim - len(used))
    together = used == list(range(used[0], used[0] + len(used)))
    front = used[0] if together else 0
    rest = [dim for place, dim in enumerate(source.dims) if place not in used]
    return [[*rest[:front], *_plain(shape[front : front + taken]), *rest[front:]]]


def index_put(call: Call) -> list[Dims]:
    source, places = call.args[0], list(call.args[1])
    used = [place for place, tensor in enumerate(places) if tensor is not None]
    call.protect([source.dims[place] for place in used], "entries are written by number")
    values, rest = call.args[2], [p for p in range(source.ndim) if p not in used]
    for place in range(1, len(rest) + 1):
        if values.ndim >= place and values.shape[-place] == source.shape[rest[-place]] != 1:
            call.ids.same(values.dims[-place], source.dims[rest[-place]])
    call.protect(values.dims[: max(values.ndim - len(rest), 0)], "entries are written by number")
    return [list(source.dims)]


def index_add(call: Call) -> list[Dims]:
    source, place, values = call.args[0], call.args[1] % call.args[0].ndim, call.args[3]
    call.protect([source.dims[place], values.dims[place]], "entries are written by number")
    for other, (a, b) in enumerate(zip(source.dims, values.dims, strict=True)):
        if other != place:
            call.ids.same(a, b)
    return [list(source.dims)]


def scatter(call: Call) -> list[Dims]:
    """Entries are written by number along one dimension; the others line up."""
    source, place = call.args[0], call.args[1] % call.args[0].ndim
    for seen in call.operands:
        if seen.ndim == source.ndim:
            call.protect([seen.dims[place]], "entries are written by number")
            for other in range(source.ndim):
                if other != place and seen.shape[other] == source.shape[other]:
                    call.ids.same(source.dims[other], seen.dims[other])
                elif other != place:
                    call.protect([source.dims[other], seen.dims[other]], "entries are written by number")
    return [list(source.dims)]


def placed(call: Call) -> list[Dims]:
    """slice_scatter and its kin: the source is written into a part."""
    target, source = call.args[0], call.args[1]
    place = call.arg("dim", 0) % target.ndim
    call.protect([target.dims[place]], "written by position")
    left = [dim for other, dim in enumerate(target.dims) if other != place]
    inner = [d for o, d in enumerate(source.dims) if o != place] if source.ndim == target.ndim else source.dims
    if source.ndim == target.ndim:
        call.protect([source.dims[place]], "written by position")
    for a, b in zip(left, inner, strict=True):
        call.ids.same(a, b)
    return [list(target.dims)]


def _rows(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_rows(view, "view _unsafe_view reshape _reshape_alias view_copy"),
    **_rows(permute, "permute permute_copy"),
    **_rows(transpose, "transpose t transpose_ t_"),
    **_rows(squeeze, "squeeze squeeze_"),
    **_rows(unsqueeze, "unsqueeze unsqueeze_"),
    **_rows(expand, "expand expand_copy"),
    **_rows(repeat, "repeat"),
    **_rows(slice_, "slice"),
    **_rows(select, "select"),
    **_rows(unbind, "unbind"),
    **_rows(split, "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk split_copy"),
    **_rows(cat, "cat concat"),
    **_rows(stack, "stack"),
    **_rows(flip, "flip"),
    **_rows(roll, "roll"),
    **_rows(pad, "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"),
    **_rows(as_strided, "as_strided as_strided_"),
    **_rows(as_complex, "view_as_complex"),
    **_rows(as_real, "view_as_real"),
    **_rows(pixel_shuffle, "pixel_shuffle"),
    **_rows(pixel_unshuffle, "pixel_unshuffle"),
    **_rows(gated_halves, "glu"),
    **_rows(diagonal, "diagonal"),
    **_rows(unfold, "unfold"),
    **_rows(unary, "alias detach detach_ clone contiguous _to_copy to lift_fresh lift view_as dropout tril triu"),
    **_rows(unary, "native_dropout resolve_conj resolve_neg _conj zeros_like ones_like full_like empty_like rand_like"),
    **_rows(unary, "randn_like fill_ zero_ normal_ uniform_ bernoulli_ exponential_ _assert_async nan_to_num"),
    **_rows(elementwise, "copy_ copy masked_fill masked_fill_ where lerp addcmul addcdiv rsub bernoulli clamp"),
    **_rows(
        elementwise,
        "floor_divide polar log_sigmoid_forward hardswish hardswish_ _prelu_kernel complex",
    ),
    **_rows(matmul, "mm bmm addmm baddbmm mv addmv dot"),
    **_rows(linear, "linear"),
    **_rows(trilinear, "_trilinear"),
    **_rows(grouped_matmul, "_grouped_mm"),
    **_rows(weight_norm, "_weight_norm_interface"),
    **_rows(columns, "im2col"),
    **_rows(masked_scatter, "masked_scatter"),
    **_rows(outer, "outer ger"),
    **_rows(convolution, "convolution _convolution"),
    **_rows(attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention"),
    **_rows(attention, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention"),
    **_rows(batch_norm, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training"),
    **_rows(batch_norm, "cudnn_batch_norm _batch_norm_no_update _batch_norm_with_update"),
    **_rows(layer_norm, "native_layer_norm _fused_rms_norm"),
    **_rows(group_norm, "native_group_norm"),
    **_rows(reduction, "sum mean var std var_mean std_mean"),
    **_rows(extreme, "aminmax amax amin max min argmax argmin prod any all logsumexp median"),
    **_rows(norm, "norm linalg_vector_norm"),
    **_rows(
        chained,
        "_safe_softmax _softmax _log_softmax softmax cumsum cumprod topk sort kthvalue cummax cummin logcumsumexp",
    ),
    **_rows(spatial, "avg_pool1d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool1d max_pool2d_with_indices"),
    **_rows(spatial, "adaptive_max_pool2d max_pool1d_with_indices avg_pool3d max_pool3d_with_indices"),
    **_rows(
        spatial, "_adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d"
    ),
    **_rows(spatial, "upsample_bicubic2d upsample_linear1d upsample_trilinear3d _upsample_bilinear2d_aa"),
    **_rows(spatial, "_upsample_bicubic2d_aa _upsample_nearest_exact2d _upsample_nearest_exact1d max_pool1d"),
    **_rows(embedding, "embedding"),
    **_rows(gather, "gather"),
    **_rows(index_select, "index_select"),
    **_rows(index, "index"),
    **_rows(index_put, "index_put index_put_ _unsafe_index_put _index_put_impl_"),
    **_rows(index_add, "index_add index_add_ index_copy index_copy_"),
    **_rows(scatter, "scatter scatter_ scatter_add scatter_add_ scatter_reduce"),
    **_rows(placed, "slice_scatter select_scatter"),
    **_rows(created, "zeros ones full empty new_zeros new_ones new_full new_empty rand randn empty_strided"),
    **_rows(constant, "arange linspace scalar_tensor eye tril_indices triu_indices nonzero bincount histc randperm"),
    **_rows(constant, "_local_scalar_dense item is_nonzero equal randint isin searchsorted bucketize one_hot"),
    **_rows(constant, "unique_consecutive _unique2 _is_all_true _is_any_true"),
}
