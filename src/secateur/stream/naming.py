"""Which tensors of a checkpoint make up which parameters of a model.

Names on disk differ from names in the model: prefixes, renamed layers, experts stored one by one and stacked in memory.
transformers knows how; this module is the only one that asks it. Everything is verified by value when it is first loaded:
the way back has to give the bytes that were read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError

Read = Callable[[str], Tensor]


@dataclass
class Group:
    """Tensors that turn into parameters together. A plain rename has one of each and no converter."""

    key: str  # the first parameter
    sources: list[tuple[str, str]] = field(default_factory=list)  # (name on disk, pattern that it matched)
    converter: Any = None
    members: dict[str, torch.Size] = field(default_factory=dict)  # all parameters that it makes
    verified: bool = False
    by_place: bool = False  # the conversion's own inverse does not give back what was read


class Naming:
    """The correspondence between a model and the names in its checkpoint."""

    def __init__(self, model: nn.Module, names: Iterable[str], blank: Read) -> None:
        """blank: a tensor's shape and dtype on the meta device. Raises SecateurError for names that do not convert."""
        self.model, self._blank = model, blank
        self.groups, self.unused = _group(model, names)
        for group in self.groups.values():
            group.members = {name: made.shape for name, made in self.assemble(group, blank).items()}

    def assemble(self, group: Group, read: Read) -> dict[str, Tensor]:
        """Parameter name -> tensor in the stored dtype."""
        if group.converter is None:
            return {group.key: read(group.sources[0][0])}
        converter = deepcopy(group.converter)
        for name, pattern in group.sources:
            converter.add_tensor(group.key, name, pattern, read(name))
        try:
            return self._convert(converter, group.key)
        except (TypeError, ValueError, LookupError, RuntimeError, AttributeError) as error:
            raise SecateurError(
                f"{group.sources[0][0]} and others do not convert to {group.key} ({error}).\n"
                "  The config and the weights do not belong together, or they are of another version of transformers."
            ) from None

    def _convert(self, converter: Any, key: str) -> dict[str, Tensor]:
        made = converter.convert(key, model=self.model, config=getattr(self.model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def disassemble(self, group: Group, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: name on disk -> tensor."""
        if group.converter is None:
            return {group.sources[0][0]: parameters[group.key]}
        return self._by_place(group, parameters) if group.by_place else self._reversed(group, parameters) or {}

    def verify(self, group: Group, parameters: Mapping[str, Tensor], read: Read) -> None:
        """Find a way back that gives what was read, bit for bit. Raises SecateurError when there is none."""
        if group.converter is None or group.verified:
            return
        for group.by_place in (False, True):
            made = self.disassemble(group, parameters)
            if made and all(torch.equal(made[name], read(name)) for name, _ in group.sources):
                group.verified = True
                return
        raise SecateurError(f"{group.sources[0][0]}: its conversion to {group.key} cannot be undone exactly")

    def _reversed(self, group: Group, parameters: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """By the inverse that transformers gives, or None where it leads elsewhere.

        It gives the converter's own names, before renamings and prefixes. Patterns and order tell which is which.
        """
        from transformers.core_model_loading import dot_natural_key

        try:
            reverse, key = group.converter.reverse_transform(), ""
            for name in group.members:
                key, pattern = reverse.rename_source_key(name)
                if pattern is None:
                    return None
                reverse.add_tensor(key, name, pattern, parameters[name])
            made = self._convert(reverse, key)
        except (TypeError, ValueError, LookupError, RuntimeError, AttributeError, NotImplementedError):
            return None
        found: dict[str, list[Tensor]] = {}
        for name in sorted(made, key=dot_natural_key):
            found.setdefault(group.converter.rename_source_key(name)[1], []).append(made[name])
        out: dict[str, Tensor] = {}
        for name, pattern in group.sources:
            if not found.get(pattern):
                return None
            out[name] = found[pattern].pop(0)
        return out

    def _by_place(self, group: Group, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the places of the numbers instead of the numbers, and read off where each one came from.

        Good for whatever only moves numbers about. It takes four bytes or more for each.
        """
        shapes = {name: self._blank(name).shape for name, _ in group.sources}
        starts, total = {}, 0
        for name, shape in shapes.items():
            starts[name], total = total, total + shape.numel()
        kind = torch.int32 if total < 2**31 else torch.int64

        def places(name: str) -> Tensor:
            return torch.arange(starts[name], starts[name] + shapes[name].numel(), dtype=kind).view(shapes[name])

        first = parameters[next(iter(group.members))]
        flat = torch.empty(total, dtype=first.dtype, device=first.device)
        filled = 0
        for member, place in self.assemble(group, places).items():
            if place.dtype != kind or place.shape != parameters[member].shape:
                return {}
            flat[place.flatten().long().to(flat.device)] = parameters[member].flatten().to(flat.dtype)
            filled += place.numel()
        if filled != total:
            return {}
        return {name: flat[starts[name] : starts[name] + shape.numel()].view(shape) for name, shape in shapes.items()}


def _group(model: nn.Module, names: Iterable[str]) -> tuple[dict[str, Group], list[str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    state = dict(model.state_dict())
    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = getattr(model, "base_model_prefix", "")
    groups: dict[str, Group] = {}
    unused = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            unused.append(name)
            continue
        group = groups.setdefault(target, Group(target))
        group.sources.append((name, pattern or name))
        if pattern is not None:
            group.converter = by_pattern[pattern]
        elif len(group.sources) > 1:
            raise SecateurError(f"the checkpoint has {target} twice: as {group.sources[0][0]} and as {name}")
    return groups, unused
