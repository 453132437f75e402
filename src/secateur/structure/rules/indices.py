"""Operators that look up or write entries by number: those numbers have a meaning, and stay."""

from __future__ import annotations

from secateur.structure.rules.call import Call, Dims, plain


def embedding(call: Call) -> list[Dims]:
    table, places = call.args[0], call.args[1]
    call.protect([table.dims[0]], "rows are looked up by number")
    return [[*places.dims, *table.dims[1:]]]


def embedding_bag(call: Call) -> list[Dims]:
    """Sums or means of rows of a table."""
    table = call.args[0]
    call.protect([table.dims[0]], "rows are looked up by number")
    return [[None, *table.dims[1:]], *(plain(shape) for shape in call.outputs[1:])]


def sampled(call: Call) -> list[Dims]:
    """grid_sample: a place of the output is read at places of the input; channels stay."""
    x, grid = call.args[0], call.args[1]
    call.protect([*x.dims[2:], *grid.dims[1:]], "space that is sampled")
    call.ids.same(x.dims[0], grid.dims[0])  # heads may be among the batch
    return [[*x.dims[:2], *plain(call.outputs[0][2:])]]


def packed(call: Call) -> list[Dims]:
    """pack_padded_sequence: [time, batch, features] -> [steps, features]."""
    return [[None, *call.args[0].dims[2:]], *(plain(shape) for shape in call.outputs[1:])]


def gather(call: Call) -> list[Dims]:
    source, place = call.args[0], call.args[1] % call.args[0].ndim
    call.protect([source.dims[place]], "entries are looked up by number")
    index = call.args[2]
    dims: Dims = []
    for other, dim in enumerate(source.dims):
        whole = other != place and index.shape[other] == source.shape[other]
        if whole:
            call.ids.same(dim, index.dims[other])
        else:
            call.protect([dim, index.dims[other]], "entries are looked up by number")
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
    return [[*rest[:front], *plain(shape[front : front + taken]), *rest[front:]]]


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
