"""Operators that work element by element, make tensors anew, or are not known."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.structure.identities import Dim, Identities
from secateur.structure.rules.call import Call, Dims, Seen, plain


def elementwise(call: Call) -> list[Dims]:
    """Operands and output broadcast: what stands at the same place is the same."""
    shape = call.outputs[0]
    merged = [broadcast(call.ids, call.operands, shape, -place) for place in range(len(shape), 0, -1)]
    return [list(merged) if out == shape else plain(out) for out in call.outputs]


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
    return [list(first.dims) if shape == first.shape else plain(shape) for shape in call.outputs]


def created(call: Call) -> list[Dims]:
    """A constant tensor: its sizes follow whatever it meets."""
    return [[call.ids.new(size) if size > 1 else None for size in shape] for shape in call.outputs]


def filled(call: Call) -> list[Dims]:
    """zeros_like and its kin: as many as the operand has, but none of them is one of its own."""
    source = call.operands[0]
    dims: Dims = [None if dim is None else call.ids.new(len(dim)) for dim in source.dims]
    call.equal_parts += [[old, new] for old, new in zip(source.dims, dims, strict=True) if new is not None]
    return [dims if shape == source.shape else plain(shape) for shape in call.outputs]


def constant(call: Call) -> list[Dims]:
    """A tensor whose values depend on their places, or that reads values: nothing can be removed."""
    for operand in call.operands:
        call.protect(operand.dims, f"{call.name} reads its values")
    return [plain(shape) for shape in call.outputs]


def unknown(call: Call) -> list[Dims]:
    """Whatever it does, nothing that it touches is removed."""
    for operand in call.operands:
        call.protect(operand.dims, f"{call.name}: no rule for this operator")
    return [plain(shape) for shape in call.outputs]
