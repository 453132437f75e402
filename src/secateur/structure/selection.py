"""Which units go: how many from each coupling, so that what is asked remains, and which ones.

One pass: a coupling loses its units in the order of their scores, in steps that keep its blocks even; how many steps each
loses follows from the ratio that is asked, or from the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor

from secateur.errors import SecateurError
from secateur.recipe import nearest
from secateur.structure.budget import Costs
from secateur.structure.coupling import Coupling, Ints
from secateur.structure.couplings import Couplings
from secateur.structure.kinds import KINDS

MULTIPLE = {"channels": 8, "groups": 1, "heads": 1, "queries": 1, "head_dim": 8, "rank": 8}  # others 64
NOT_BY_DEFAULT = ("head_dim", "queries", "rank")  # a budget does not take from these unless they are named
LEAST = 0.1  # share of every coupling that a budget leaves


@dataclass(frozen=True)
class Candidate:
    """A coupling that may lose units. order: of each block the units, those that go first in front."""

    number: int
    coupling: Coupling
    order: tuple[Ints, ...]
    means: np.ndarray  # mean score of the units of each step
    allowed: Ints  # how many steps may remain, ascending

    def units(self, left: int) -> Ints:
        """The units that go when so many steps are left."""
        gone = self.coupling.steps - left
        per_step = [len(block) // self.coupling.steps for block in self.order]
        return np.concatenate([block[: gone * n] for block, n in zip(self.order, per_step, strict=True)])

    def at_most(self, steps: float) -> int:
        """The largest number of steps that may remain and is not above, or the smallest that there is."""
        place = int(np.searchsorted(self.allowed, steps + 1e-9, side="right")) - 1
        return int(self.allowed[max(place, 0)])

    def closest(self, steps: float) -> int:
        """The number of steps that may remain that is nearest; of two the smaller."""
        return int(self.allowed[np.argmin(np.abs(self.allowed - steps) + 1e-9 * self.allowed)])


def candidates(
    couplings: Couplings,
    scores: Mapping[str, Tensor],
    multiple: int | None,
    least: float,
) -> list[Candidate]:
    """The couplings that have scores, with their units in the order in which they go."""
    found = []
    for number, coupling in enumerate(couplings):
        if coupling.name not in scores:
            continue
        values = scores[coupling.name].double().cpu().numpy()
        order = tuple(block[np.argsort(values[block], kind="stable")] for block in coupling.blocks)
        steps = coupling.steps
        rows = np.concatenate([values[block].reshape(steps, -1) for block in order], axis=1)
        allowed = _allowed(coupling, multiple, least)
        found.append(Candidate(number, coupling, order, rows.mean(1), allowed))
    return found


def _allowed(coupling: Coupling, multiple: int | None, least: float) -> Ints:
    """How many steps may remain: all, or widths that are a multiple, and not fewer than the least."""
    steps = coupling.steps
    width = max(coupling.slices, key=lambda part: len(part.indices)).indices.size
    asked = MULTIPLE.get(coupling.kind, 64) if multiple is None else multiple
    if multiple is None:
        while asked > 1 and asked * 8 > width:  # a narrow dimension is rounded to a smaller power of two
            asked //= 2
    left = np.arange(max(1, math.ceil(least * steps)), steps + 1)
    widths = left * width // steps
    found = left[(widths % asked == 0) | (left == steps)]
    return found if len(found) else np.array([steps])


def by_ratio(found: Sequence[Candidate], remove: Mapping[str, float]) -> dict[int, Ints]:
    """Units to remove by coupling. remove: kind or glob over names -> share, or number where it is 1 or more."""
    removed = {}
    for candidate in found:
        asked = next((remove[key] for key in reversed(list(remove)) if matches(candidate.coupling, key)), None)
        if asked:
            share = asked if asked < 1 else asked / max(map(len, candidate.coupling.blocks))
            removed[candidate.number] = candidate.units(candidate.closest((1 - share) * candidate.coupling.steps))
    return {number: units for number, units in removed.items() if len(units)}


def matches(coupling: Coupling, pattern: str) -> bool:
    """Whether a kind, a glob over names of couplings, or the name of a parameter means this coupling; or a glob that all of
    its parameters match: one over a layer does not mean the width of the whole model.
    """
    if pattern == coupling.kind or fnmatchcase(coupling.name, pattern):
        return True
    if any(part.parameter == pattern for part in coupling.slices):
        return True
    return all(fnmatchcase(part.parameter, pattern) for part in coupling.slices)


def touches(coupling: Coupling, pattern: str) -> bool:
    """Whether removing from this coupling would change what a kind or a glob names: what is protected does not change."""
    return matches(coupling, pattern) or any(fnmatchcase(part.parameter, pattern) for part in coupling.slices)


def check_patterns(
    couplings: Couplings, patterns: Sequence[str], meant: Callable[[Coupling, str], bool] = matches
) -> None:
    """Raises SecateurError for a pattern that means nothing."""
    for pattern in patterns:
        if not any(meant(coupling, pattern) for coupling in couplings):
            kinds = sorted({coupling.kind for coupling in couplings})
            what = f"{pattern!r} ({KINDS[pattern]})" if pattern in KINDS else repr(pattern)
            raise SecateurError(
                f"{what} is nothing that can be removed from this model{nearest(pattern, kinds)}; there is: "
                f"{', '.join(kinds)}, or a glob over names such as {couplings[0].name!r}"
                if len(couplings)
                else "nothing can be removed from this model"
            )


def by_budget(
    couplings: Couplings, costs: Costs, found: Sequence[Candidate], target: Mapping[str, float], allocation: str
) -> dict[int, Ints]:
    """Units to remove so that what remains of every cost is within its budget.

    target: params, macs, bytes -> the share that may remain, or a number where it is above 1. Raises SecateurError, with
    the nearest that can be reached, where that is not within the budget.
    """
    whole = costs.of({})
    budget = {name: value * whole[name] if value <= 1 else value for name, value in target.items()}
    left = _uniform if allocation == "uniform" else _pooled
    _check_reachable(costs, found, budget, whole)
    low, high = 0.0, 1.0  # a pressure of 0 removes nothing, of 1 all that may go
    for _ in range(40):
        middle = (low + high) / 2
        if _fits(costs, found, left(found, middle), budget):
            high = middle
        else:
            low = middle
    chosen = left(found, high)
    return {c.number: c.units(n) for c, n in zip(found, chosen, strict=True) if n < c.coupling.steps}


def _uniform(found: Sequence[Candidate], pressure: float) -> list[int]:
    """The same share of every coupling."""
    return [c.at_most((1 - pressure) * c.coupling.steps) for c in found]


def _pooled(found: Sequence[Candidate], pressure: float) -> list[int]:
    """The steps with the lowest scores of all."""
    every = np.sort(np.concatenate([c.means for c in found]))
    border = every[min(int(pressure * len(every)), len(every) - 1)] if pressure < 1 else np.inf
    return [c.at_most(int((np.maximum.accumulate(c.means) >= border).sum())) for c in found]


def _fits(costs: Costs, found: Sequence[Candidate], left: Sequence[int], budget: Mapping[str, float]) -> bool:
    remains = costs.of({c.number: n / c.coupling.steps for c, n in zip(found, left, strict=True)})
    return all(remains[name] <= most for name, most in budget.items())


def _check_reachable(
    costs: Costs, found: Sequence[Candidate], budget: Mapping[str, float], whole: Mapping[str, int]
) -> None:
    least = costs.of({c.number: float(c.allowed[0]) / c.coupling.steps for c in found})
    for name, most in budget.items():
        if least[name] > most:
            kinds = ", ".join(sorted({c.coupling.kind for c in found})) or "nothing"
            raise SecateurError(
                f"{name}: {most:,.0f} may remain ({most / whole[name]:.1%}), but with {kinds} cut as far as allowed "
                f"{least[name]:,} do: the nearest reachable is {math.ceil(least[name] / whole[name] * 1000) / 1000:.3f}.\n"
                "  Name more kinds, let less of each remain (least), or drop whole layers."
            )
