"""What can be removed from a model, kind by kind, and how the result would load; what cannot, and why."""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from torch import nn

from secateur.structure.coupling import Coupling, Ints
from secateur.structure.couplings import Couplings
from secateur.structure.depth import stacks
from secateur.structure.experts import experts_cut, mixtures
from secateur.structure.hf_config import config_without, configs_for
from secateur.structure.rehearsal import share
from secateur.structure.running import runner
from secateur.structure.saved import OURS, STOCK
from secateur.structure.sizes import Clash
from secateur.structure.sublayers import sublayers
from secateur.structure.surgery import cut_of, dead_of
from secateur.structure.watch import on_meta, tensors_of


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
    blocks: Mapping[
        str, tuple[int, str]
    ]  # list of blocks -> how many, and how the model loads without the last of them
    sublayers: Mapping[str, int]  # attention and MLPs that a block can do without
    experts: Mapping[str, int]
    experts_load: str = ""


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
    return Survey(found, protected, _blocks(couplings.model), _sublayers(couplings), *_experts(couplings.model))


def _blocks(model: nn.Module) -> dict[str, tuple[int, str]]:
    found = {}
    for name, members in stacks(model).items():
        config, count = _config(model), len(members)
        shorter = config and config_without(type(model), config, {name: (count, range(count - 1))})
        found[name] = (count, "" if config is None else OURS if shorter is None else STOCK)
    return found


def _sublayers(couplings: Couplings) -> dict[str, int]:
    """How many of each kind; found by values, so that there are none on the meta device."""
    model = couplings.model
    if on_meta(model):
        return {}
    return dict(Counter(was.kind for was in sublayers(model, runner(model, couplings.inputs)).values()))


def _experts(model: nn.Module) -> tuple[dict[str, int], str]:
    """Experts of every layer, and how the model loads with half of them."""
    found = mixtures(model)
    half = {m.name: np.arange(m.count // 2) for m in found}
    loads = _loads_with(model, experts_cut(model, found, half).kept, ()) if found else ""
    return {m.name: m.count for m in found}, loads


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
    if _config(couplings.model) is None:
        return ""
    if members[0].kind == "head_dim":  # a config that has the shapes changes the scale of attention
        return OURS
    dead = dead_of(couplings.facts, [(c, share(c, c.steps // 2)) for c in members])
    try:
        kept = cut_of(couplings.facts, dead).kept
    except Clash:
        return OURS
    return _loads_with(couplings.model, kept, {Fraction(c.steps - c.steps // 2, c.steps) for c in members})


def _loads_with(model: nn.Module, kept: Mapping[str, Mapping[int, Ints]], ratios: Collection[Fraction]) -> str:
    shapes = {}
    for name, tensor in tensors_of(model).items():
        dims = kept.get(name, {})
        shapes[name] = tuple(len(dims[d]) if d in dims else n for d, n in enumerate(tensor.shape))
    found = next(itertools.islice(configs_for(model, copy.deepcopy(_config(model)), shapes, ratios), 1), None)
    return OURS if found is None else STOCK


def _config(model: nn.Module) -> Any | None:
    config = getattr(model, "config", None)
    return config if hasattr(config, "to_dict") else None
