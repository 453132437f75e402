"""What can be removed from a model, kind by kind, and how the result would load; what cannot, and why."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from secateur.structure.coupling import Coupling
from secateur.structure.couplings import Couplings
from secateur.structure.depth import stacks
from secateur.structure.experts import mixtures
from secateur.structure.hf_config import configs_for
from secateur.structure.rehearsal import share
from secateur.structure.sizes import Clash
from secateur.structure.surgery import cut_of, dead_of
from secateur.structure.watch import tensors_of


@dataclass(frozen=True)
class Removable:
    """A kind of structure. sizes: units of each coupling, each size once. loads: "stock" where a config can have half of
    them removed everywhere, "secateur.load" where none can; "" for a model without a config.
    """

    kind: str
    couplings: int
    sizes: tuple[int, ...]
    exact: bool
    loads: str
    example: str


@dataclass(frozen=True)
class Survey:
    """All kinds, and the reasons for what is protected: reason -> dimensions, numbers in their names left out."""

    removable: tuple[Removable, ...]
    protected: Mapping[str, tuple[str, ...]]
    blocks: Mapping[str, int]
    experts: Mapping[str, int]


def survey(couplings: Couplings) -> Survey:
    """Look at what `trace` found."""
    kinds: dict[str, list[Coupling]] = {}
    for coupling in couplings:
        kinds.setdefault(coupling.kind, []).append(coupling)
    found = tuple(_removable(couplings, kind, members) for kind, members in kinds.items())
    reasons: dict[str, list[str]] = {}
    for name, reason in couplings.protected.items():
        reasons.setdefault(reason, []).append(re.sub(r"\d+(?=\.)", "*", name))
    protected = {reason: tuple(dict.fromkeys(names)) for reason, names in reasons.items()}
    blocks = {name: len(members) for name, members in stacks(couplings.model).items()}
    return Survey(found, protected, blocks, {m.name: m.count for m in mixtures(couplings.model)})


def _removable(couplings: Couplings, kind: str, members: list[Coupling]) -> Removable:
    return Removable(
        kind,
        len(members),
        tuple(sorted({coupling.size for coupling in members})),
        all(coupling.exact for coupling in members),
        _loads(couplings, members),
        members[0].name,
    )


def _loads(couplings: Couplings, members: list[Coupling]) -> str:
    """Whether some config has the shapes that are left when half of every coupling goes. Outputs are not compared."""
    model: nn.Module = couplings.model
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return ""
    if members[0].kind == "head_dim":  # a config that has the shapes changes the scale of attention
        return "secateur.load"
    dead = dead_of(couplings.facts, [(c, share(c, c.steps // 2)) for c in members])
    try:
        kept = cut_of(couplings.facts, dead).kept
    except Clash:
        return "secateur.load"
    shapes = {}
    for name, tensor in tensors_of(model).items():
        dims = kept.get(name, {})
        shapes[name] = tuple(len(dims[d]) if d in dims else n for d, n in enumerate(tensor.shape))
    ratios = {Fraction(c.steps - c.steps // 2, c.steps) for c in members}
    found = next(itertools.islice(configs_for(model, copy.deepcopy(config), shapes, ratios), 1), None)
    return "secateur.load" if found is None else "stock"
