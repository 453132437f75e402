"""Couplings: the slices of parameters that must be removed together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from secateur.structure.identities import Indices
from secateur.structure.trace import Facts


@dataclass(frozen=True)
class Slice:
    """What units own of one dimension of a parameter: indices [units, indices per unit]."""

    parameter: str
    dim: int
    indices: NDArray[np.int64]

    def __str__(self) -> str:
        return f"{self.parameter}[{', '.join([':'] * self.dim + [_pattern(self.indices)])}]"


def _pattern(indices: NDArray[np.int64]) -> str:
    """Indices of unit i as a person would write them: i, 64i:64i+64, i + {0, 512, 1024}."""
    units, per = indices.shape
    step = int(indices[1, 0] - indices[0, 0]) if units > 1 else 0
    regular = bool((indices == indices[:1] + step * np.arange(units)[:, None]).all())
    if not regular:
        return f"{per} per unit"
    first = indices[0]
    start = f"{step}i" if step != 1 else "i"
    offset = int(first[0])
    begin = f"{start}+{offset}" if offset else start
    if per == 1:
        return begin
    if bool((np.diff(first) == 1).all()):
        return f"{begin} : {start}+{offset + per}"
    return f"{start} + {{{', '.join(map(str, first[:4]))}{', ..' if per > 4 else ''}}}"


@dataclass(frozen=True)
class Coupling:
    """Units that can be removed one by one, each with all of its slices. roots: their identities."""

    name: str
    size: int
    slices: tuple[Slice, ...]
    roots: Indices = field(repr=False)
    norms: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.size} units"]
        lines += [f"    {part}" for part in self.slices]
        return "\n".join(lines)


def couplings(facts: Facts) -> list[Coupling]:
    """All that can be removed, in the order of the parameters."""
    places = list(_columns(facts))
    weight = np.random.default_rng(0).integers(1, 2**62, len(places))
    top = facts.ids._used
    signature = np.zeros(top, np.int64)
    first = np.full(top, 2**62)
    for number, (_, _, column) in enumerate(places):
        free = column >= 0
        np.add.at(signature, column[free], weight[number])
        position = (np.int64(number) << 32) + np.arange(len(column))
        np.minimum.at(first, column[free], position[free])
    roots = np.flatnonzero(signature)
    roots = roots[np.argsort(first[roots])]
    marks, inverse = np.unique(signature[roots], return_inverse=True)
    members = [roots[inverse == number] for number in range(len(marks))]
    members.sort(key=lambda group: first[group[0]])
    unit = np.full(top, -1)
    owner = np.full(top, -1)
    for number, group in enumerate(members):
        unit[group], owner[group] = np.arange(len(group)), number
    slices: list[list[Slice]] = [[] for _ in members]
    for parameter, dim, column in places:
        free = np.flatnonzero(column >= 0)
        owners = owner[column[free]]
        for number in np.unique(owners):
            mine = free[owners == number]
            order = mine[np.argsort(unit[column[mine]], kind="stable")]
            slices[number].append(Slice(parameter, dim, order.reshape(len(members[number]), -1)))
    return [
        Coupling(f"{parts[0].parameter}.{parts[0].dim}", len(group), tuple(parts), group)
        for group, parts in zip(members, slices, strict=True)
    ]


def _columns(facts: Facts) -> Iterator[tuple[str, int, Indices]]:
    """Each parameter's and buffer's dimension, with the free factors of its indices, a column at a time."""
    known: dict[int, list[Indices]] = {}
    for name, dims in facts.dims.items():
        for place, dim in enumerate(dims):
            if dim is None:
                continue
            key = id(dim)
            if key not in known:
                known[key] = facts.ids.factors(dim)
            for column in known[key]:
                if (column >= 0).any():
                    yield name, place, column
