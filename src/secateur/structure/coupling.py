"""Couplings: the slices of parameters that must be removed together, unit by unit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from secateur.structure.identities import Dim, Indices
from secateur.structure.watch import Facts

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Slice:
    """What units `start`, `start` + 1, .. own of one dimension of a parameter: indices [units, indices per unit]."""

    parameter: str
    dim: int
    indices: Ints
    start: int = 0

    def __str__(self) -> str:
        return f"{self.parameter}[{', '.join([':'] * self.dim + [_pattern(self.indices)])}]"


def _pattern(indices: Ints) -> str:
    """The indices of unit i as a person would write them: i, 64i : 64i+64, i + {0, 512, 1024}."""
    units, per = indices.shape
    step = int(indices[1, 0] - indices[0, 0]) if units > 1 else 1
    if not bool((indices == indices[:1] + step * np.arange(units)[:, None]).all()):
        return "i in an order of its own" if per == 1 else f"{per} of each unit"
    first = indices[0]
    times = "i" if step == 1 else f"{step}i"
    begin = f"{times}+{first[0]}" if first[0] else times
    if per == 1:
        return begin
    if bool((np.diff(first) == 1).all()):
        return f"{begin} : {times}+{first[0] + per}"
    return f"{times} + {{{', '.join(map(str, first[:4]))}{', ..' if per > 4 else ''}}}"


@dataclass(frozen=True)
class Coupling:
    """Units that can be removed, each with all of its slices.

    blocks: from each the same share of units has to go (the groups of a GroupNorm, the halves of a chunk); one block
    where any units may go. exact: no norm, mean or maximum runs over the units, so that removing equals zeroing.
    """

    name: str
    kind: str
    size: int
    slices: tuple[Slice, ...]
    blocks: tuple[Ints, ...]
    exact: bool
    roots: Indices = field(repr=False)
    grain: int = 1

    @property
    def steps(self) -> int:
        """In how many equal steps all units could be removed."""
        return math.gcd(*(len(block) // math.gcd(len(block), self.grain) for block in self.blocks))

    def __str__(self) -> str:
        head = f"{self.name} ({self.kind}): {self.size} units"
        if len(self.blocks) > 1:
            head += f" in {len(self.blocks)} blocks that keep equal shares, {self.steps} steps"
        elif self.grain > 1:
            head += f", {self.grain} at a time"
        if not self.exact:
            head += "; a norm, mean or maximum runs over them"
        lines, starts = [head], list(dict.fromkeys(part.start for part in self.slices))
        for start, end in itertools.pairwise([*starts, self.size]):
            lines += [f"  units {start} to {end - 1}"] if len(starts) > 1 else []
            lines += [f"    {part}" for part in self.slices if part.start == start]
        return "\n".join(lines)


@dataclass
class _Layout:
    """Every free identity with the coupling that it belongs to and its place in it."""

    places: list[tuple[str, int, Indices]]
    members: list[Indices]
    owner: Ints
    unit: Ints


def find_couplings(facts: Facts, parameters: set[str]) -> list[Coupling]:
    """All that can be removed, in the order of the parameters. What cannot be kept in balance gets protected."""
    while True:
        layout = _layout(facts, parameters)
        links = _Links(layout)
        if all(links.balance(facts, parts) for parts in _constraints(facts)):
            return _couplings(facts, layout, links)


def _layout(facts: Facts, parameters: set[str]) -> _Layout:
    places = list(_columns(facts))
    weight = np.random.default_rng(0).integers(1, 2**62, len(places))
    top = facts.ids.count
    signature, first, real = np.zeros(top, np.int64), np.full(top, 2**62), np.zeros(top, bool)
    for number, (name, _, column) in enumerate(places):
        free = column >= 0
        np.add.at(signature, column[free], weight[number])
        np.minimum.at(first, column[free], ((np.int64(number) << 32) + np.arange(len(column)))[free])
        real[column[free]] |= name in parameters
    roots = np.flatnonzero(real)
    roots = roots[np.argsort(first[roots])]
    marks, inverse = np.unique(signature[roots], return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    bounds = np.searchsorted(inverse[order], np.arange(len(marks) + 1))
    members = [roots[order[a:b]] for a, b in itertools.pairwise(bounds)]
    members.sort(key=lambda group: first[group[0]])
    unit, owner = np.full(top, -1), np.full(top, -1)
    for number, group in enumerate(members):
        unit[group], owner[group] = np.arange(len(group)), number
    return _Layout(places, members, owner, unit)


def _columns(facts: Facts) -> Iterator[tuple[str, int, Indices]]:
    """Each parameter's and buffer's dimension, with the free factors of its indices, a column at a time."""
    known: dict[int, list[Indices]] = {}
    for name, dims in facts.dims.items():
        for place, dim in enumerate(dims):
            if dim is None:
                continue
            if id(dim) not in known:
                known[id(dim)] = [column for column in facts.ids.factors(dim) if (column >= 0).any()]
            yield from ((name, place, column) for column in known[id(dim)])


def _constraints(facts: Facts) -> Iterator[list[Dim]]:
    """Dimensions of which the same share has to stay: equal parts, and what one attribute counts."""
    yield from facts.equal_parts
    counted: dict[object, list[Dim]] = {}
    for use in facts.uses:
        if not use.size.mixed:
            counted.setdefault((use.size.keys, int(use.size)), []).append(use.dim)
    for dims in counted.values():
        unlike = list({id(dim): dim for dim in dims}.values())
        if len(unlike) > 1:
            yield unlike


class _Links:
    """Which couplings lose equal shares together, and in which blocks."""

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout
        self.group = list(range(len(layout.members)))
        self.labels: list[Ints] = [np.zeros(len(member), np.int64) for member in layout.members]

    def balance(self, facts: Facts, parts: Sequence[Dim]) -> bool:
        """Whether the same share of each part can be kept. Otherwise what stands in the way gets protected."""
        columns = [[] if part is None else facts.ids.factors(part) for part in parts]
        owners = [[self._owner(column) for column in part] for part in columns]
        touched = sorted({int(number) for part in owners for one in part for number in np.unique(one) if number >= 0})
        uneven: dict[int, Ints] = {}
        for number in touched:
            counts = np.stack([self._counts(number, part, one) for part, one in zip(columns, owners, strict=True)])
            if (counts != counts[0]).any():
                uneven[number] = counts
        if not uneven:
            return True
        numbers = np.array(list(uneven))
        covered, inner = [], set[int]()
        for part in owners:
            outer = np.zeros(part[0].shape if part else 1, bool)
            for one in part:
                mine = np.isin(one, numbers)
                inner |= set(one[mine & outer].tolist())
                outer |= mine
            covered.append(float(outer.mean()))
        if stuck := set(uneven) if len(set(covered)) > 1 else inner:  # of a product, the outer factor may go by shares
            for number in stuck:
                reason = "it would change one of several sizes that the code takes to be equal"
                facts.ids.protect(self._layout.members[number], reason)
            return False
        for number, counts in uneven.items():
            _, pattern = np.unique(counts, axis=1, return_inverse=True)
            _, self.labels[number] = np.unique(
                np.stack([self.labels[number], pattern.reshape(-1)]), axis=1, return_inverse=True
            )
        lowest = min(self.group[number] for number in uneven)
        joined = {self.group[number] for number in uneven}
        self.group = [lowest if group in joined else group for group in self.group]
        return True

    def _owner(self, column: Indices) -> Ints:
        return np.where(column >= 0, self._layout.owner[np.maximum(column, 0)], -1)

    def _counts(self, number: int, columns: list[Indices], owners: list[Ints]) -> Ints:
        counts = np.zeros(len(self._layout.members[number]), np.int64)
        for column, owner in zip(columns, owners, strict=True):
            counts += np.bincount(self._layout.unit[column[owner == number]], minlength=len(counts))
        return counts


def _couplings(facts: Facts, layout: _Layout, links: _Links) -> list[Coupling]:
    slices = _slices(layout)
    reduced = _reduced(facts)
    found = []
    for group in dict.fromkeys(links.group):
        numbers = [number for number, other in enumerate(links.group) if other == group]
        starts = np.cumsum([0, *(len(layout.members[number]) for number in numbers)])
        parts, blocks = [], []
        for start, number in zip(starts, numbers, strict=False):
            parts += [Slice(s.parameter, s.dim, s.indices, int(start)) for s in slices[number]]
            labels = links.labels[number].reshape(-1)
            blocks += [start + np.flatnonzero(labels == label) for label in np.unique(labels)]
        roots = np.concatenate([layout.members[number] for number in numbers])
        name = f"{parts[0].parameter}:{parts[0].dim}"
        exact = not bool(reduced[roots].any())
        grain = math.lcm(*(each for own, each in facts.grains if own[0] in roots))
        found.append(Coupling(name, "units", len(roots), tuple(parts), tuple(blocks), exact, roots, grain))
    return found


def _reduced(facts: Facts) -> NDArray[np.bool_]:
    """Which identities a norm, a mean or a maximum runs over."""
    reduced = np.zeros(facts.ids.count, bool)
    for dim, _ in facts.reductions:
        for column in [] if dim is None else facts.ids.factors(dim):
            reduced[column[column >= 0]] = True
    return reduced


def _slices(layout: _Layout) -> list[list[Slice]]:
    slices: list[list[Slice]] = [[] for _ in layout.members]
    for parameter, dim, column in layout.places:
        free = np.flatnonzero(column >= 0)
        owners = layout.owner[column[free]]
        for number in np.unique(owners):
            if number < 0:
                continue
            mine = free[owners == number]
            order = mine[np.argsort(layout.unit[column[mine]], kind="stable")]
            slices[number].append(Slice(parameter, dim, order.reshape(len(layout.members[number]), -1)))
    return slices
