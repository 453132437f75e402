"""What a model costs, and what remains of it when units go: parameters, bytes, multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from secateur.structure.coupling import Ints
from secateur.structure.couplings import Couplings
from secateur.structure.identities import Dim
from secateur.structure.watch import tensors_of

COSTS = ("params", "macs", "bytes")


@dataclass(frozen=True)
class _Product:
    """A constant times the sizes of dimensions, each a sum of products of how many units remain."""

    constant: float
    sizes: tuple[tuple[tuple[int, tuple[int, ...]], ...], ...]  # per dimension: (indices, couplings that they die with)

    def value(self, kept: Mapping[int, float]) -> float:
        return self.constant * math.prod(
            sum(count * math.prod(kept.get(number, 1.0) for number in numbers) for count, numbers in size)
            for size in self.sizes
        )


class Costs:
    """Parameters, bytes and multiply-accumulates as functions of the shares of units that remain.

    Exact for whole units, because every unit of a coupling owns equally many indices of each dimension.
    """

    def __init__(self, couplings: Couplings) -> None:
        facts = couplings.facts
        self._facts = facts
        self._owner = np.full(facts.ids.count, -1)
        for number, coupling in enumerate(couplings):
            self._owner[facts.ids.find(coupling.roots)] = number
        self._known: dict[int, tuple[tuple[int, tuple[int, ...]], ...]] = {}
        self._terms: dict[str, list[_Product]] = {name: [] for name in COSTS}
        trained = {name for name, _ in couplings.model.named_parameters()}
        seen: set[int] = set()
        for name, tensor in tensors_of(couplings.model).items():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            free = [self._size(dim) for dim in facts.dims[name] if dim is not None]
            rest = math.prod(n for n, dim in zip(tensor.shape, facts.dims[name], strict=True) if dim is None)
            if name in trained:
                self._terms["params"].append(_Product(rest, tuple(free)))
            size = couplings.stored.get(name, tensor.element_size())
            self._terms["bytes"].append(_Product(rest * size, tuple(free)))
        self._terms["macs"] = [_Product(w.constant, tuple(map(self._size, w.dims))) for w in facts.work]

    def _size(self, dim: Dim) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """How many indices die with which couplings."""
        assert dim is not None
        if id(dim) not in self._known:
            known = [np.where(c >= 0, self._owner[np.maximum(c, 0)], -1) for c in self._facts.ids.factors(dim)]
            owners: Ints = np.sort(np.stack(known), axis=0) if known else np.zeros((0, len(dim)), np.int64)
            alike: Ints = np.zeros(len(dim), np.int64)  # by the couplings of an index, as far as seen
            for row in owners if len(dim) and (owners != owners[:, :1]).any() else ():
                alike = np.unique(alike * (len(self._owner) + 1) + row + 1, return_inverse=True)[1]
            _, first, counts = np.unique(alike, return_index=True, return_counts=True)
            self._known[id(dim)] = tuple(
                (int(count), tuple(sorted({int(n) for n in owners[:, place] if n >= 0})))
                for place, count in zip(first, counts, strict=True)
            )
        return self._known[id(dim)]

    def of(self, kept: Mapping[int, float]) -> dict[str, int]:
        """All costs. kept: number of the coupling -> share of its units that remain; 1 where it is not named."""
        return {name: round(sum(term.value(kept) for term in terms)) for name, terms in self._terms.items()}
