"""A plan of removal: a frozen value that says what goes, what stays and why, and that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.structure.coupling import Ints
from secateur.structure.running import Inputs

VERSION = 1
RECOMPUTED = "recomputed"  # norms run over what remains
Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tensors:
    """What happens to one parameter or buffer. kept: dimension -> ranges of indices that stay."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    kept: Mapping[int, Ranges]


@dataclass(frozen=True)
class Attribute:
    """An integer of a module or config that counts what was cut. place: in a tuple; -1 where it is none."""

    owner: str
    name: str
    place: int
    before: int
    after: int


@dataclass(frozen=True)
class Removal:
    """What a coupling loses. kept: ranges of its units that stay; why: for one that loses nothing, the reason."""

    coupling: str
    kind: str
    size: int
    kept: Ranges
    exact: bool
    why: str = ""

    @property
    def left(self) -> int:
        """How many units stay."""
        return sum(stop - start for start, stop in self.kept)


@dataclass(frozen=True)
class Layers:
    """What a list of blocks loses: how many it had, and the places that stay."""

    before: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Sublayer:
    """A part of a block that goes alone. kind: attention, mlp, or unread for what only fed another one.

    hands_on: which of the tensors that it is given it hands on when it has nothing to add; -1: none, for what it returns is
    added elsewhere. returns: length of the tuple that it returns, 0 for a tensor. width: the last size of what it
    returns; 0: as that of what it is given.
    """

    kind: str
    hands_on: int
    returns: int
    width: int


@dataclass(frozen=True)
class Plan:
    """What goes, what stays, and what was promised and seen.

    promise: "removed == masked", or "recomputed" where a norm, mean or maximum runs over fewer elements: then the cut model
    equals the masked one whose norms run over what remains. difference: of the two, relative to the largest output.
    """

    model: str
    tensors: Mapping[str, Tensors]
    attributes: tuple[Attribute, ...]
    removals: tuple[Removal, ...]
    protected: Mapping[str, str]
    promise: str
    difference: float
    before: Mapping[str, int]
    after: Mapping[str, int]
    inputs: Any
    layers: Mapping[str, Layers] = field(default_factory=dict)
    experts: Mapping[str, Ranges] = field(default_factory=dict)  # layer of experts -> those that stay
    sublayers: Mapping[str, Sublayer] = field(default_factory=dict)  # attention and MLPs that go
    version: int = VERSION

    def explain(self) -> str:
        """The plan for people: what goes from where, what it saves, and why the rest stays."""
        lines = [f"{self.model}: {self.promise}, difference {self.difference:.1e} of the largest output"]
        for name in self.before:
            share = self.after[name] / max(self.before[name], 1)
            lines.append(f"  {name:7s} {self.before[name]:>16,} -> {self.after[name]:>16,}  ({share:.1%} remain)")
        for name, change in self.layers.items():
            gone = sorted(set(range(change.before)) - set(change.kept))
            lines.append(f"  {name}: {change.before} blocks -> {len(change.kept)}, without {', '.join(map(str, gone))}")
        for kind, names in self._gone().items():
            lines.append(f"  without {len(names)} x {kind}: {', '.join(names)}")
        width = max((len(removal.coupling) for removal in self.removals), default=0)
        for removal in self.removals:
            note = "" if removal.exact else "  (a norm, mean or maximum runs over them)"
            cut = f"{removal.size} -> {removal.left}" if removal.left < removal.size else f"{removal.size} kept"
            lines.append(f"  {removal.coupling:{width}s}  {cut}{note}{': ' + removal.why if removal.why else ''}")
        lines += [f"  {name}: protected, {why}" for name, why in self.protected.items()]
        return "\n".join(lines)

    def _gone(self) -> dict[str, list[str]]:
        """Sublayers by kind."""
        found: dict[str, list[str]] = {}
        for name, sublayer in self.sublayers.items():
            found.setdefault(sublayer.kind, []).append(name)
        return found

    def to_json(self) -> dict[str, Any]:
        """A dict that JSON can hold, and `from_json` reads."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote. Raises SecateurError when it is none."""
        try:
            if values["version"] != VERSION:
                raise SecateurError(f"this plan has version {values['version']}; this secateur reads version {VERSION}")
            tensors = {
                name: Tensors(
                    tuple(t["before"]), tuple(t["after"]), {int(d): _ranges_of(r) for d, r in t["kept"].items()}
                )
                for name, t in values["tensors"].items()
            }
            attributes = tuple(Attribute(**a) for a in values["attributes"])
            removals = tuple(Removal(**{**r, "kept": _ranges_of(r["kept"])}) for r in values["removals"])
            rest = {key: values[key] for key in ("model", "protected", "promise", "difference", "before", "after")}
            layers = {name: Layers(c["before"], tuple(c["kept"])) for name, c in values["layers"].items()}
            return Plan(
                **rest,
                tensors=tensors,
                attributes=attributes,
                removals=removals,
                inputs=values["inputs"],
                layers=layers,
                experts={name: _ranges_of(kept) for name, kept in values["experts"].items()},
                sublayers={name: Sublayer(**was) for name, was in values["sublayers"].items()},
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise SecateurError(f"this is no plan of secateur: {type(error).__name__} {error}") from None

    def __str__(self) -> str:
        return self.explain()


def sizes_of(module: nn.Module) -> dict[str, int]:
    """Parameters of a module, and bytes of them and its buffers."""
    parameters = list(module.parameters())
    return {
        "params": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in [*parameters, *module.buffers()]),
    }


def ranges(indices: Ints) -> Ranges:
    """Ascending indices as half-open ranges."""
    if not len(indices):
        return ()
    breaks = np.flatnonzero(np.diff(indices) != 1)
    starts, stops = indices[np.append(0, breaks + 1)], indices[np.append(breaks, len(indices) - 1)] + 1
    return tuple(zip(starts.tolist(), stops.tolist(), strict=True))


def indices_of(kept: Ranges) -> Ints:
    """The indices that ranges stand for."""
    return np.concatenate([np.arange(start, stop) for start, stop in kept] or [np.zeros(0, np.int64)])


def _ranges_of(values: Any) -> Ranges:
    return tuple((int(start), int(stop)) for start, stop in values)


def describe(inputs: Inputs) -> Any:
    """Example inputs as JSON: integers as they are, other numbers as a shape and a scale to draw from."""
    if isinstance(inputs, Tensor):
        if not inputs.is_floating_point():
            inputs = torch.zeros_like(inputs, device="cpu") if inputs.device.type == "meta" else inputs
            return {"tensor": inputs.tolist(), "dtype": str(inputs.dtype).removeprefix("torch.")}
        scale = float(inputs.float().std()) if inputs.numel() > 1 and inputs.device.type != "meta" else 1.0
        return {"shape": list(inputs.shape), "scale": scale or 1.0}
    if isinstance(inputs, Mapping):
        return {"named": {key: describe(value) for key, value in inputs.items()}}
    if isinstance(inputs, (list, tuple)):
        return {"listed": [describe(value) for value in inputs]}
    return {"value": inputs if isinstance(inputs, (bool, int, float, str)) else None}


def inputs_from(described: Any, seed: int = 0) -> Any:
    """Inputs of the kind that `describe` wrote down, with other numbers."""
    if "tensor" in described:
        return torch.tensor(described["tensor"], dtype=getattr(torch, described["dtype"]))
    if "shape" in described:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(described["shape"], generator=generator) * described["scale"]
    if "named" in described:
        return {key: inputs_from(value, seed + 1) for key, value in described["named"].items()}
    if "listed" in described:
        return [inputs_from(value, seed + 1) for value in described["listed"]]
    return described["value"]
