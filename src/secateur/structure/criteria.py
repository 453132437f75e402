"""How important is each unit of a coupling? A criterion scores the elements that units own; a reduction sums them up.

Add one: write a function of a `Part` that returns scores [units, elements], or None for slices that it does not look at,
add a line to CRITERIA with what it reads, and a row to the table in tests/structure/test_importance.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.structure.activations import Moments, activations
from secateur.structure.coupling import Coupling, Slice
from secateur.structure.couplings import Couplings
from secateur.weights.gradients import Loss, derivatives


@dataclass(frozen=True)
class Part:
    """One slice of a coupling, by unit. units: [units, elements]; so are gradient and fisher (E[g], E[g^2]).

    inputs: what the units' indices of this dimension were multiplied with, [units, indices] each; None where the
    dimension is not one that is multiplied with activations.
    """

    name: str
    units: Tensor
    gradient: Tensor | None
    fisher: Tensor | None
    inputs: Moments | None
    bare: bool  # a vector: a bias or the weight of a norm
    seed: int


Score = Callable[[Part], Tensor | None]
PIECE = 1 << 22  # elements that are scored at a time


def magnitude(part: Part) -> Tensor | None:
    """|w|. Reduced by the root of the sum of squares it is the norm of the unit's weights. Li et al. 2017."""
    return part.units.abs()


def taylor(part: Part) -> Tensor | None:
    """|w g|: first-order change of the loss, element-wise. LLM-Pruner, Ma et al. 2023, arXiv:2305.11627, eq. 5."""
    assert part.gradient is not None
    return (part.units * part.gradient).abs()


def taylor2(part: Part) -> Tensor | None:
    """|w g - w^2 F / 2|: with a second-order term, the Hessian's diagonal taken as E[g^2]. LLM-Pruner, eq. 5 and 6."""
    assert part.gradient is not None
    assert part.fisher is not None
    return (part.units * part.gradient - part.units.square() * part.fisher / 2).abs()


def fisher(part: Part) -> Tensor | None:
    """w^2 F / 2: the second-order change alone, at a minimum of the loss. Theis et al. 2018; LeCun et al. 1989."""
    assert part.fisher is not None
    return part.units.square() * part.fisher / 2


def activation(part: Part) -> Tensor | None:
    """mean |x| of what the next layers read of a unit. Minitron, Muralidharan et al. 2024, arXiv:2407.14679, sec. 2.2."""
    return None if part.inputs is None else part.inputs.mean_abs


def fluctuation(part: Part) -> Tensor | None:
    """Var(x) ||w||^2: how much what is read of a unit fluctuates; the mean could go to a bias. FLAP, An et al. 2023,
    arXiv:2312.11983, eq. 4.
    """
    if part.inputs is None:
        return None
    columns = part.units.unflatten(1, (part.inputs.variance.shape[1], -1)).square().sum(-1)  # [units, indices]
    return part.inputs.variance * columns


def wanda(part: Part) -> Tensor | None:
    """|w| ||x||: Sun et al. 2023, arXiv:2306.11695, eq. 1, over the weights that read a unit."""
    if part.inputs is None:
        return None
    weights = part.units.unflatten(1, (part.inputs.variance.shape[1], -1))  # [units, indices, elements]
    return (weights.abs() * part.inputs.norm.unsqueeze(-1)).flatten(1)


def norm_scale(part: Part) -> Tensor | None:
    """|gamma| of the norms that a unit passes. Network slimming, Liu et al. 2017, arXiv:1708.06519."""
    return part.units.abs() if part.bare and part.name.endswith("weight") else None


def random(part: Part) -> Tensor | None:
    """Uniform noise: the baseline that every criterion has to beat."""
    generator = torch.Generator().manual_seed(part.seed)
    return torch.rand(len(part.units), 1, generator=generator)


class Criterion(NamedTuple):
    """A score, what it reads ("gradient", "fisher", "inputs"), and how elements become a unit's score."""

    score: Score
    needs: frozenset[str]
    reduce: str
    about: str


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude, frozenset(), "l2", "norm of the weights of a unit"),
    "taylor": Criterion(taylor, frozenset({"gradient"}), "sum", "weight times gradient of the loss"),
    "taylor2": Criterion(taylor2, frozenset({"gradient", "fisher"}), "sum", "taylor with a second-order term"),
    "fisher": Criterion(fisher, frozenset({"fisher"}), "sum", "weight squared times squared gradient"),
    "activation": Criterion(activation, frozenset({"inputs"}), "mean", "mean absolute activation"),
    "flap": Criterion(fluctuation, frozenset({"inputs"}), "sum", "fluctuation of the activation"),
    "wanda": Criterion(wanda, frozenset({"inputs"}), "sum", "weight times norm of its input"),
    "norm-scale": Criterion(norm_scale, frozenset(), "sum", "scale of the norm that a unit passes"),
    "random": Criterion(random, frozenset(), "sum", "no information: the baseline"),
}
REDUCTIONS = ("sum", "mean", "l2", "max")


def importance(
    couplings: Couplings,
    criterion: str = "magnitude",
    *,
    batches: Sequence[Any] = (),
    loss: Loss | None = None,
    reduce: str | None = None,
    seed: int = 0,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Coupling -> scores [units], each coupling's divided by its mean so that layers compare; low goes first.

    batches: what the model is called with, for criteria that read data. loss(model, batch) -> scalar, for gradients.
    reduce: how a unit's elements are put together: sum, mean, l2, max; by default what the criterion's paper does.
    tensors: names and parameters from elsewhere than the model, one at a time: a checkpoint that does not fit.

    Raises SecateurError for unknown names and missing data. A coupling that the criterion has nothing to say of (no norm
    with a scale, nothing that reads it) is not among the scores.
    """
    if criterion not in CRITERIA:
        raise SecateurError(f"unknown criterion {criterion!r}; known for structure: {', '.join(CRITERIA)}")
    how = CRITERIA[criterion]
    if reduce is not None and reduce not in REDUCTIONS:
        raise SecateurError(f"unknown reduction {reduce!r}; known: {', '.join(REDUCTIONS)}")
    if how.needs and not batches:
        raise SecateurError(f"the criterion {criterion} reads data, and there is none: give batches")
    seen = _seen(couplings, how.needs, batches, loss)
    totals = [_Total(coupling, reduce or how.reduce) for coupling in couplings]
    owners: dict[str, list[tuple[int, Slice]]] = {}
    for number, coupling in enumerate(couplings):
        for part in coupling.slices:
            owners.setdefault(part.parameter, []).append((number, part))
    for name, tensor in couplings.model.named_parameters() if tensors is None else tensors:
        for number, whole in owners.get(name, ()):  # a tied parameter comes once, under one of its names
            for part in _pieces(whole, tensor):
                found = how.score(_part(part, tensor, seen, seed * 1000003 + 1009 * number + part.start))
                if found is not None:
                    totals[number].add(part, found)
    scores = {total.coupling.name: total.result() for total in totals}
    return {name: found for name, found in scores.items() if found is not None}


def _pieces(part: Slice, tensor: Tensor) -> Iterator[Slice]:
    """A slice some units at a time, so that its copies stay small."""
    each = max(1, tensor.numel() // tensor.shape[part.dim] * part.indices.shape[1])
    step = max(1, PIECE // each)
    for start in range(0, len(part.indices), step):
        yield Slice(part.parameter, part.dim, part.indices[start : start + step], part.start + start)


class _Total:
    """The scores of a coupling's units, an element at a time."""

    def __init__(self, coupling: Coupling, reduce: str) -> None:
        self.coupling, self.reduce = coupling, reduce
        self._sum = torch.zeros(coupling.size, dtype=torch.float64)
        self._count = torch.zeros(coupling.size, dtype=torch.float64)

    def add(self, part: Slice, found: Tensor) -> None:
        """Scores [units, elements] of a slice."""
        where = slice(part.start, part.start + len(part.indices))
        if self.reduce == "max":
            self._sum[where] = torch.maximum(self._sum[where], found.amax(1).double().cpu())
        elif self.reduce == "l2":
            self._sum[where] += found.to(torch.float64, copy=True).square_().sum(1).cpu()
        else:
            self._sum[where] += found.sum(1, dtype=torch.float64).cpu()
        self._count[where] += found.shape[1]

    def result(self) -> Tensor | None:
        """Divided by the mean; None where some units have no elements that the criterion looks at."""
        if not bool(self._count.all()):
            return None
        total = self._sum.sqrt() if self.reduce == "l2" else self._sum
        total = total / self._count if self.reduce == "mean" else total
        mean = float(total.mean())
        return total / (mean if mean > 0 and math.isfinite(mean) else 1.0)


@dataclass(frozen=True)
class _Seen:
    gradient: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor]
    inputs: Mapping[tuple[str, int], Moments]


def _seen(couplings: Couplings, needs: frozenset[str], batches: Sequence[Any], loss: Loss | None) -> _Seen:
    model = couplings.model
    gradient: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    if needs & {"gradient", "fisher"}:
        if loss is None:
            raise SecateurError("this criterion needs a loss: give loss(model, batch) -> scalar")
        trained = dict(model.named_parameters())
        names = [name for name in dict.fromkeys(p.parameter for c in couplings for p in c.slices) if name in trained]
        for name, found in derivatives(model, names, batches, loss, needs, 0, 0).items():
            count = max(found.samples, 1)
            if found.gradient is not None:
                gradient[name] = found.gradient / count
            if found.squares is not None:
                squares[name] = found.squares / count
    inputs = activations(couplings, batches) if "inputs" in needs else {}
    return _Seen(gradient, squares, inputs)


def _part(part: Slice, tensor: Tensor, seen: _Seen, seed: int) -> Part:
    indices = torch.from_numpy(part.indices)
    units = len(part.indices)

    def rows(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        first, count = int(part.indices.flat[0]), part.indices.size
        if bool((part.indices.reshape(-1) == np.arange(first, first + count)).all()):
            picked = values.detach().narrow(part.dim, first, count)
        else:
            picked = values.detach().index_select(part.dim, indices.reshape(-1).to(values.device))
        return picked.float().movedim(part.dim, 0).reshape(units, -1)

    moments = seen.inputs.get((part.parameter, part.dim))
    weight = rows(tensor)
    assert weight is not None
    return Part(
        part.parameter,
        weight,
        rows(seen.gradient.get(part.parameter)),
        rows(seen.fisher.get(part.parameter)),
        None if moments is None else moments.at(indices),
        tensor.ndim == 1,
        seed,
    )
