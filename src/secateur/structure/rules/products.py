"""Operators that multiply and sum: whatever is summed over has to die on both sides."""

from __future__ import annotations

import math

from secateur.structure.identities import Dim
from secateur.structure.rules.call import Call, Dims, Seen, Work, plain
from secateur.structure.rules.pointwise import broadcast, broadcast_all, unknown


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
    pointwise = not transposed and all(
        (window, step, padding) == (1, 1, 0)
        for window, step, padding in zip(weight.shape[2:], call.args[3], call.args[4], strict=True)
    )
    if not pointwise:
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
    return [[x.dims[0], out, *(x.dims[2:] if pointwise else plain(call.outputs[0][2:]))]]


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
    return [[*q.dims[:3], v.dims[3]], *(plain(shape) for shape in call.outputs[1:])]


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


def distances(call: Call) -> list[Dims]:
    """[.., n, k] and [.., m, k]: all distances [.., n, m], sums over k."""
    a, b = call.args[0], call.args[1]
    call.ids.same(a.dims[-1], b.dims[-1])
    call.reductions.append(a.dims[-1])
    return [[*plain(call.outputs[0][:-2]), a.dims[-2], b.dims[-2]]]


def outer(call: Call) -> list[Dims]:
    return [[call.args[0].dims[0], call.args[1].dims[0]]]
