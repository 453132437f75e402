"""Which tensors of a checkpoint make up which parameters of a model.

Names on disk differ from names in the model: prefixes, renamed layers, experts stored one by one and stacked in memory.
transformers knows how; this module is the only one that asks it. Everything is verified by value when a block is loaded:
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

    key: str  # the first parameter, by which the group belongs to a block
    sources: list[tuple[str, str]] = field(default_factory=list)  # (name on disk, pattern that it matched)
    converter: Any = None


class Naming:
    """The correspondence between a model and the names in its checkpoint."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self.groups, self.unused = _group(model, names)

    def within(self, prefix: str) -> list[Group]:
        """Groups whose parameters lie in a module ("" = all)."""
        return [group for key, group in self.groups.items() if key.startswith(f"{prefix}." if prefix else "")]

    def assemble(self, group: Group, read: Read) -> dict[str, Tensor]:
        """Parameter name -> tensor in the stored dtype."""
        if group.converter is None:
            return {group.key: read(group.sources[0][0])}
        converter = deepcopy(group.converter)
        for name, pattern in group.sources:
            converter.add_tensor(group.key, name, pattern, read(name))
        made = converter.convert(group.key, model=self.model, config=getattr(self.model, "config", None))
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def disassemble(self, group: Group, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: name on disk -> tensor."""
        if group.converter is None:
            return {group.sources[0][0]: parameters[group.key]}
        from transformers.core_model_loading import revert_weight_conversion

        made = revert_weight_conversion(self.model, dict(parameters))  # type: ignore[arg-type]
        wanted = {name for name, _ in group.sources}
        if set(made) != wanted:
            raise SecateurError(
                f"{group.key}: the checkpoint stores it as {sorted(wanted)[0]} and others, and this version of "
                f"transformers writes {sorted(made)[0]}.\n  Load the model with transformers, save_pretrained it, and "
                "prune that folder."
            )
        return made

    def verify(self, group: Group, parameters: Mapping[str, Tensor], read: Read) -> None:
        """Raise SecateurError unless disassembling gives back what was read, bit for bit."""
        if group.converter is None:
            return
        for name, tensor in self.disassemble(group, parameters).items():
            if not torch.equal(tensor, read(name)):
                raise SecateurError(f"{name}: its conversion to {group.key} cannot be undone exactly")


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
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]  # type: ignore[assignment]
    return groups, unused
