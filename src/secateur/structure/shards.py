"""Cut a checkpoint on its shards, a tensor at a time: for models that do not fit into memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.stream.checkpoint import DTYPES, INDEX, SINGLE, Checkpoint, open_checkpoint, to_bytes
from secateur.stream.naming import Group
from secateur.stream.source import Source
from secateur.structure.origins import kept_of
from secateur.structure.plans import Plan
from secateur.structure.surgery import Keep, narrowed

Shapes = dict[str, tuple[int, ...]]
ALIGNED = 8  # bytes: what the format wants a header's length to be a multiple of


def tensors_of_source(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under one of its names, read and dropped one after the other."""
    parameters = {name for name, _ in source.model.named_parameters(remove_duplicate=False)}
    for group in source.naming.groups.values():
        made = source.naming.assemble(group, source.checkpoint.read)
        yield from ((name, tensor) for name, tensor in made.items() if name in parameters)


def cut_checkpoint(source: Source, plan: Plan, out: Path) -> None:
    """Write the shards of a checkpoint with the shapes of a plan into a folder, under the same names.

    Raises SecateurError where what is on disk cannot be cut on its own (a conversion that only works on whole tensors).
    """
    kept = kept_of(plan)
    groups = _groups(source, plan)
    shapes: Shapes = {}
    for group in source.naming.groups.values():
        shapes |= _shapes_on_disk(source, group, kept)
    with _Shards(source.checkpoint, shapes, out) as shards:
        copied = set(source.checkpoint.entries) - {name for group in groups for name, _ in group.sources}
        for group in groups:
            made = source.naming.assemble(group, source.checkpoint.read)
            source.naming.verify(group, made, source.checkpoint.read)
            cut = {name: narrowed(tensor, kept.get(name, {})) for name, tensor in made.items()}
            for name, tensor in source.naming.disassemble(group, cut).items():
                shards.write(name, tensor)
            source.checkpoint.close()  # what was mapped counts as memory until it is let go
        for name in sorted(copied):
            shards.write(name, source.checkpoint.read(name))
    _write_index(source.checkpoint, out)


def check_shards(source: Source, plan: Plan, out: Path) -> None:
    """Read the cut shards again: every tensor is the narrowed original, bit for bit. Raises SecateurError."""
    kept = kept_of(plan)
    written = open_checkpoint(out)
    for group in source.naming.groups.values():
        made = source.naming.assemble(group, source.checkpoint.read)
        again = source.naming.assemble(group, written.read)
        for name, tensor in made.items():
            if not torch.equal(narrowed(tensor, kept.get(name, {})), again[name]):
                raise SecateurError(f"{name} on the cut shards is not what was cut; please report this")
        source.checkpoint.close()
        written.close()


def _groups(source: Source, plan: Plan) -> list[Group]:
    """All groups of tensors, after a check that the plan fits them."""
    found = list(source.naming.groups.values())
    shapes = {name: tuple(shape) for group in found for name, shape in group.members.items()}
    for name, change in plan.tensors.items():
        if name in shapes and shapes[name] != tuple(change.before):
            raise SecateurError(
                f"the plan is for {name} {list(change.before)}; the checkpoint has {list(shapes[name])}"
            )
    return found


def _shapes_on_disk(source: Source, group: Group, kept: Mapping[str, Mapping[int, Keep]]) -> Shapes:
    """Name on disk -> shape after the cut, found without reading anything."""

    def blank(name: str) -> Tensor:
        entry = source.checkpoint.entries[name]
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    made = source.naming.assemble(group, blank)
    cut = {name: narrowed(tensor, kept.get(name, {})) for name, tensor in made.items()}
    found = source.naming.disassemble(group, cut)
    missing = [name for name, _ in group.sources if name not in found]
    if missing:
        raise SecateurError(
            f"{missing[0]} is stored in a way that can only be converted whole, and so cannot be cut on its shard.\n"
            "  Load the model where it fits into memory and cut it there."
        )
    return {name: tuple(tensor.shape) for name, tensor in found.items()}


class _Shards:
    """Files with the header of the cut shards, filled tensor by tensor."""

    def __init__(self, checkpoint: Checkpoint, shapes: Shapes, out: Path) -> None:
        self._checkpoint, self._out = checkpoint, out
        self._places: dict[str, tuple[str, int, int]] = {}  # shard, start, bytes
        self._files: dict[str, IO[bytes]] = {}
        for shard in checkpoint.shards:
            self._begin(shard, shapes)

    def _begin(self, shard: str, shapes: Shapes) -> None:
        names = [name for name, entry in self._checkpoint.entries.items() if entry.shard == shard]
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name in sorted(names, key=lambda name: self._checkpoint.entries[name].start):
            entry = self._checkpoint.entries[name]
            shape = shapes.get(name, entry.shape)
            size = math.prod(shape) * DTYPES[entry.dtype].itemsize
            header[name] = {"dtype": entry.dtype, "shape": list(shape), "data_offsets": [start, start + size]}
            self._places[name] = (shard, start, size)
            start += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % ALIGNED)
        file = (self._out / shard).open("w+b")
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
        self._files[shard] = file
        self._places |= {name: (shard, 8 + len(text) + self._places[name][1], self._places[name][2]) for name in names}

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place. Raises SecateurError when it has not the size that was announced."""
        shard, start, size = self._places[name]
        content = to_bytes(tensor, self._checkpoint.entries[name].dtype)
        if content.nbytes != size:
            raise SecateurError(f"{name} became {content.nbytes} bytes, {size} were planned; please report this")
        self._files[shard].seek(start)
        self._files[shard].write(content)

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()


def _write_index(checkpoint: Checkpoint, out: Path) -> None:
    if checkpoint.shards == [SINGLE]:
        return
    size = sum((out / shard).stat().st_size for shard in checkpoint.shards)
    weight_map = {name: entry.shard for name, entry in checkpoint.entries.items()}
    content = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(content, indent=1), encoding="utf-8")
