"""What a coupling is called: heads, ffn, hidden, channels. Read off its slices and the model's blocks, not off names."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from secateur.structure.coupling import Coupling, Ints, Slice

KINDS = {
    "hidden": "the width of the residual stream, through all blocks that share it",
    "heads": "attention heads; with grouped queries a key-value head and the query heads that use it",
    "queries": "query heads, as many from each key-value group",
    "head_dim": "entries of every head of a layer",
    "ffn": "neurons between two linear layers of a block",
    "rank": "the inner width of a product of two matrices of lower rank, such as an adapter's",
    "channels": "channels of convolutions",
    "groups": "whole groups of grouped convolutions",
    "units": "anything else",
}


def named(found: Sequence[Coupling], tensors: Mapping[str, Tensor], blocks: Collection[str]) -> list[Coupling]:
    """The couplings with their kinds, and names to match. tensors: by name. blocks: names of the repeated blocks."""
    given: set[str] = set()
    result = []
    for coupling in found:
        starts = dict.fromkeys(part.start for part in coupling.slices)  # of several that are tied in number
        kinds = [_kind([p for p in coupling.slices if p.start == start], tensors, blocks) for start in starts]
        kind = next((kind for kind in ("hidden", "head_dim") if kind in kinds), kinds[0])
        name = base = f"{_home(coupling)}:{kind}".lstrip(":")
        number = 2
        while name in given:
            name, number = f"{base}:{number}", number + 1
        given.add(name)
        result.append(replace(coupling, kind=kind, name=name))
    return result


def _home(coupling: Coupling) -> str:
    """The innermost module that holds all that a coupling is of, or the first of them where that is the whole model."""
    paths = [part.parameter.split(".")[:-1] for part in coupling.slices]
    common = [steps[0] for steps in itertools.takewhile(lambda s: len(set(s)) == 1, zip(*paths, strict=False))]
    return ".".join(common or paths[0])


def _kind(slices: Sequence[Slice], tensors: Mapping[str, Tensor], blocks: Collection[str]) -> str:
    weights = [(part, tensors[part.parameter]) for part in slices if tensors[part.parameter].ndim > 1]
    shapes = [_shape(part.indices) for part, _ in weights]
    touched = {_block(part.parameter, blocks) for part, _ in weights}
    convolves = any(tensor.ndim > 3 for _, tensor in weights)
    if any(shape == "run" for shape in shapes) and not _flattened(slices, tensors):
        return "groups" if all(t.ndim > 2 for _, t in weights) else "heads"
    if shapes and all(shape == "runs" for shape in shapes) and len({part.dim for part, _ in weights}) > 1:
        return "queries"  # from rows of one matrix to columns of another; pairs of entries of heads are rows alone
    if shapes and all(shape in ("scattered", "runs") for shape in shapes) and not convolves:
        return "head_dim"
    if len(touched) > 1 and blocks:
        return "hidden"
    if convolves:
        return "channels"
    if len(slices) == len(weights) == 2 and touched != {None} and _low_rank(weights):
        return "rank"
    neurons = len(weights) > 1 and touched != {None} and not any(part.dim and _raw(part.parameter) for part in slices)
    return "ffn" if neurons else "units"


def _low_rank(weights: Sequence[tuple[Slice, Tensor]]) -> bool:
    """Two matrices, a tall and a wide one, whose inner width is less than both outer ones."""
    return all(t.ndim == 2 and t.shape[part.dim] < t.shape[1 - part.dim] for part, t in weights)


def _raw(parameter: str) -> bool:
    """A parameter that is no layer's weight, such as the states of Mamba."""
    return re.search(r"(weight|bias|proj)$", parameter) is None


def _shape(indices: Ints) -> str:
    """Of what the first unit owns: "one" index, a "run", several "runs", or "scattered" ones."""
    own = indices[0]
    if len(own) == 1:
        return "one"
    breaks = int((np.diff(own) != 1).sum())
    if breaks == 0:
        return "run"
    return "runs" if breaks + 1 <= len(own) // 2 else "scattered"


def _flattened(slices: Sequence[Slice], tensors: Mapping[str, Tensor]) -> bool:
    """Whether runs come from feature maps that were flattened: a channel of a convolution owns a single index of it."""
    return any(tensors[part.parameter].ndim > 3 and part.indices.shape[1] == 1 for part in slices)


def _block(name: str, blocks: Collection[str]) -> str | None:
    return next((block for block in blocks if name.startswith(f"{block}.")), None)
