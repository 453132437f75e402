"""What an operator was called with, and how a rule reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.structure.identities import Dim, Identities

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
    equal_parts: list[list[Dim]]  # of which the same share has to stay
    reductions: list[Dim]  # dimensions over which a norm, a mean or a maximum is taken
    sizes: dict[str, Dim]  # integers among the arguments that count the indices of a dimension
    work: list[Work]  # multiplications, as products of sizes
    when_read: dict[int, tuple[list[Dim], str]] = field(
        default_factory=dict
    )  # output -> what is protected once it is read

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema; the default where it was not given."""
        found = self.named.get(name)
        return default if found is None else found

    @property
    def operands(self) -> list[Seen]:
        """All tensors among the arguments, lists of tensors included."""
        return seen_in(self.named)

    def protect(self, dims: Sequence[Dim], reason: str) -> None:
        """No index of these dimensions may be removed."""
        for dim in dims:
            self.ids.protect(dim, reason)


def seen_in(named: Mapping[str, Any]) -> list[Seen]:
    """All tensors among arguments, lists of tensors included."""
    found: list[Seen] = []
    for value in named.values():
        found += [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, Seen)]
    return found


Rule = Callable[[Call], list[Dims]]


def plain(shape: Sequence[int]) -> Dims:
    return [None] * len(shape)
