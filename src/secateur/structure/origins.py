"""Where the parameters of a cut model come from: old names and old indices, through any number of plans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from secateur.structure.coupling import Ints
from secateur.structure.plans import Plan, indices_of
from secateur.structure.surgery import narrowed


@dataclass(frozen=True)
class Origin:
    """The parameter of the whole model that one of the cut model was, and the indices that are left of its dimensions."""

    name: str
    kept: Mapping[int, Ints] = field(default_factory=dict)

    def of(self, tensor: Tensor) -> Tensor:
        """What is left of the whole model's tensor: the cut one, as it was when it was cut."""
        return narrowed(tensor, self.kept)


def parameter_map(plans: Plan | Sequence[Plan], names: Iterable[str]) -> dict[str, Origin]:
    """Name in the cut model -> where it comes from, for those of the names that are left: to match a student with its
    teacher, or to cut an optimizer's state or an average of weights along.

    plans: what was applied, in that order. names: of the whole model's parameters and buffers.
    """
    found = {name: Origin(name) for name in names}
    for plan in [plans] if isinstance(plans, Plan) else plans:
        found = {
            new: Origin(origin.name, _composed(origin.kept, kept_of(plan).get(name, {})))
            for name, origin in found.items()
            if (new := _renamed(plan, name)) is not None
        }
    return found


def kept_of(plan: Plan) -> dict[str, dict[int, Ints]]:
    """Tensor -> dimension -> the indices that stay, for all that a plan cuts."""
    return {name: {d: indices_of(r) for d, r in change.kept.items()} for name, change in plan.tensors.items()}


def _renamed(plan: Plan, name: str) -> str | None:
    """The name after blocks moved up; None for what is gone."""
    if any(name.startswith(f"{gone}.") for gone in plan.sublayers):
        return None
    for parent, change in plan.layers.items():
        if name.startswith(f"{parent}."):
            place, _, rest = name[len(parent) + 1 :].partition(".")
            if int(place) not in change.kept:
                return None
            return f"{parent}.{change.kept.index(int(place))}.{rest}"
    return name


def _composed(first: Mapping[int, Ints], then: Mapping[int, Ints]) -> dict[int, Ints]:
    return {
        dim: first[dim][then[dim]] if dim in first and dim in then else np.asarray(then.get(dim, first.get(dim)))
        for dim in sorted({*first, *then})
    }
