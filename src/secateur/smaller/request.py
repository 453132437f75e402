"""What to remove from a model's structure, and what came of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from secateur.recipe import Calibration, Part
from secateur.structure import Plan
from secateur.structure.budget import COSTS
from secateur.structure.criteria import CRITERIA
from secateur.structure.planning import ALLOCATIONS
from secateur.structure.selection import LEAST
from secateur.structure.sublayers import KINDS

DEPTH = {"layers", "experts", *KINDS}  # what is chosen by running data, and not by width


class Smaller(Part):
    """What to remove from a model's structure.

    remove: kind of structure (ffn, heads, hidden, channels, layers, ..) or glob -> share, or number where it is 1 or more.
    target: params, macs or bytes -> the share that may remain.
    """

    remove: dict[str, int | float] | None = None
    target: dict[str, float] | None = None
    criterion: str | None = None
    allocation: str = "uniform"
    include: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    multiple: int | None = Field(None, ge=1)
    least: float = Field(LEAST, gt=0, le=1)
    steps: int = Field(1, ge=1)
    contiguous: bool = False
    calibration: Calibration = Calibration()
    seed: int = Field(0, ge=0, lt=2**63)
    model: str | None = None
    out: Path | None = None
    build: str | None = None
    weights: Path | None = None

    @field_validator("remove", "target", mode="before")
    @classmethod
    def _read(cls, given: Any, info: ValidationInfo) -> Any:
        """Words of a recipe: 30% or 2, and -50% for what has to go of a target."""
        if not isinstance(given, Mapping):
            return given
        return {str(name): share(value, signed=info.field_name == "target") for name, value in given.items()}

    @model_validator(mode="after")
    def _checked(self) -> Smaller:
        if (self.remove is None) == (self.target is None):
            raise ValueError("say either what to remove or what may remain (remove, target)")
        if not (self.remove or self.target):
            raise ValueError("remove and target are empty: say what goes, as in ffn: 30%")
        if unknown := [name for name in self.target or {} if name not in COSTS]:
            raise ValueError(f"unknown budget {unknown[0]!r}; known: {', '.join(COSTS)}")
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {self.criterion!r}; known for structure: {', '.join(CRITERIA)}")
        beside = {"allocation": self.allocation != "uniform", "include": self.include, "least": self.least != LEAST}
        if self.remove and (said := [name for name, value in beside.items() if value]):
            raise ValueError(f"{said[0]} is for a target: remove says itself how much goes, and of what")
        if self.contiguous and "layers" not in (self.remove or {}):
            raise ValueError("contiguous is for whole blocks that go: remove layers")
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"unknown allocation {self.allocation!r}; known for structure: {', '.join(ALLOCATIONS)}")
        return self

    def choice(self, remove: Mapping[str, int | float] | None, protect: Sequence[str] | None = None) -> dict[str, Any]:
        """How `plan` chooses among widths: remove is what was asked for without whole blocks and experts, protect what of
        the globs means widths; None: all of them.
        """
        return {
            "remove": remove,
            "target": self.target,
            "allocation": self.allocation,
            "include": self.include,
            "protect": self.protect if protect is None else protect,
            "multiple": self.multiple,
            "least": self.least,
            "seed": self.seed,
        }


def share(value: Any, signed: bool = False) -> int | float:
    """0.3, "30%", 2 or "200M" as a number: a share below 1, or a whole number of something. signed: -50% is what goes, and
    50 % remain. Raises ValueError.
    """
    expected = f"expected {'-50% or 200M' if signed else '30% or 2'}"
    match = re.fullmatch(r"([+-]?(?:\d*\.)?\d+(?:e[+-]?\d+)?)\s*(%|[kKMGB])?", str(value).strip())
    if match is None or isinstance(value, bool):
        raise ValueError(f"{value!r} is no share: {expected}")
    number = float(match.group(1)) * UNITS[match.group(2)]
    if signed:
        number = number + 1 if number < 0 else number
        if not number > 0 or (match.group(2) == "%" and number > 1):
            raise ValueError(f"{value!r} would leave nothing, or more than there is: {expected}")
        return number
    whole = number.is_integer() and match.group(2) != "%"
    if not number > 0 or (number >= 1 and not whole):
        raise ValueError(f"{value!r} is neither a share below 100% nor a whole number: {expected}")
    return int(number) if whole else number


UNITS = {None: 1.0, "%": 0.01, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}


@dataclass
class Shrunk:
    """What happened to a model. loads_with: stock libraries, or secateur.load."""

    plans: list[Plan]
    loads_with: str
    before: dict[str, Any]
    after: dict[str, Any]
    criterion: str
    calibration: str
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory: int = 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "before": self.before,
            "after": self.after,
            "loads with": self.loads_with,
            "criterion": self.criterion,
            "calibration": self.calibration,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory,
            "plans": [found.explain() for found in self.plans],
        }
