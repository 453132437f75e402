"""Cut the shapes of a model, or set to zero what would be cut: the two that have to agree."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.structure.coupling import Coupling
from secateur.structure.identities import Dim
from secateur.structure.sizes import Key, Values, owners, solve, table_of
from secateur.structure.watch import Facts, tensors_of

Keep = NDArray[np.int64]
GUESSES = 4  # at what an attribute that is only compared should be


@dataclass
class Cut:
    """What remains: kept indices by tensor and dimension, and the attributes that count them (answers to try)."""

    kept: dict[str, dict[int, Keep]]
    attributes: list[Values]


def dead_of(facts: Facts, removed: Iterable[tuple[Coupling, NDArray[np.int64]]]) -> NDArray[np.bool_]:
    """Which identities die when these units of couplings are removed."""
    dead = np.zeros(facts.ids.count, bool)
    for coupling, units in removed:
        dead[facts.ids.find(coupling.roots[units])] = True
    return dead


def cut_of(facts: Facts, dead: NDArray[np.bool_]) -> Cut:
    """The cut that leaves what has no dead factor. Raises Clash where an attribute cannot follow."""
    kept: dict[str, dict[int, Keep]] = {}
    known: dict[int, NDArray[np.bool_] | None] = {}

    def alive_of(dim: Dim) -> NDArray[np.bool_] | None:
        if id(dim) not in known:
            known[id(dim)] = alive_in(facts, dim, dead)
        return known[id(dim)]

    for name, dims in facts.dims.items():
        for place, dim in enumerate(dims):
            alive = alive_of(dim)
            if alive is not None and not alive.all():
                kept.setdefault(name, {})[place] = np.flatnonzero(alive)
    answers = solve(facts.uses, lambda dim: 0 if (alive := alive_of(dim)) is None else int(alive.sum()))
    tried = list(answers)
    for guess in _compared(facts, kept):
        tried += [new for answer in answers if (new := guess | answer) not in tried]
    return Cut(kept, tried)


def _compared(facts: Facts, kept: Mapping[str, Mapping[int, Keep]]) -> list[Values]:
    """What attributes may become that are compared with numbers: what is left of dimensions of their size, in their owner
    if it has any; that which is left of most of them first.
    """
    found: dict[Key, list[int]] = {}
    for key, (value, path) in facts.compared.items():
        like = [
            (name, len(indices))
            for name, dims in kept.items()
            for place, indices in dims.items()
            if (dim := facts.dims[name][place]) is not None and len(dim) == value
        ]
        own = [left for name, left in like if not path or name.startswith(f"{path}.")] or [left for _, left in like]
        if own:
            found[key] = [left for left, _ in Counter(own).most_common(GUESSES)]
    most = max(map(len, found.values()), default=0)
    return [{key: sizes[min(place, len(sizes) - 1)] for key, sizes in found.items()} for place in range(most)]


def alive_in(facts: Facts, dim: Dim, dead: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Which indices have no dead factor."""
    if dim is None:
        return None
    alive = np.ones(len(dim), bool)
    for column in facts.ids.factors(dim):
        column = np.where(column < len(dead), column, -1)  # what was not there when the cut was made
        alive &= ~dead[np.maximum(column, 0)] | (column < 0)
    return alive


def cut_(model: nn.Module, cut: Cut, answer: int = 0) -> Callable[[], None]:
    """Narrow tensors and set attributes. Returns what undoes it."""
    undo: list[Callable[[], None]] = []
    done: set[int] = set()
    for name, tensor in tensors_of(model).items():
        if name not in cut.kept or id(tensor) in done:
            continue
        done.add(id(tensor))
        data = narrowed(tensor.data, cut.kept[name])
        undo.append(_restore(tensor, tensor.data, tensor.grad))
        tensor.grad = None
        _swap(tensor, data)
    holders = owners(model)
    owned: dict[int, Any] = {}
    for (number, name, place), value in cut.attributes[answer].items():
        if number not in owned:
            owned[number], steps = _own(model, holders[number][1])
            undo += steps
        undo.append(_set(table_of(owned[number]), name, place, value))
    undo += _mirrors(model)
    return lambda: _all(undo)


def _own(model: nn.Module, owner: Any) -> tuple[Any, list[Callable[[], None]]]:
    """What may change: a module or a config of transformers itself, of other settings a copy that the modules get in their
    place, since they may be the caller's. And what undoes it.
    """
    if isinstance(owner, nn.Module) or hasattr(owner, "to_dict"):
        return owner, []
    tables = [
        (vars(module), key) for module in model.modules() for key, value in vars(module).items() if value is owner
    ]
    if not tables:
        return owner, []
    mine = copy.copy(owner)
    return mine, [_set(table, key, -1, mine) for table, key in tables]


def _all(undo: list[Callable[[], None]]) -> None:
    for step in reversed(undo):
        step()


def narrowed(tensor: Tensor, kept: Mapping[int, Keep]) -> Tensor:
    """The kept indices of each dimension, as a copy."""
    for dim, indices in kept.items():
        if len(indices) and bool((np.diff(indices) == 1).all()):  # a run of them, which is faster to take
            tensor = tensor.narrow(dim, int(indices[0]), len(indices)).clone(memory_format=torch.contiguous_format)
        else:
            tensor = tensor.index_select(dim, torch.from_numpy(indices).to(tensor.device))
    return tensor


def _restore(tensor: Tensor, data: Tensor, grad: Tensor | None) -> Callable[[], None]:
    def step() -> None:
        _swap(tensor, data)
        tensor.grad = grad

    return step


def _swap(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor other data, of another shape. By way of another dtype, autograd forgets the shape that it had."""
    if tensor.shape != data.shape:
        tensor.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
    tensor.data = data


def _set(table: dict[str, Any], name: str, place: int, value: Any) -> Callable[[], None]:
    before = table[name]
    if place < 0:
        table[name] = value
    else:
        items = list(before)
        items[place] = value
        table[name] = type(before)(items)

    def step() -> None:
        table[name] = before

    return step


MIRRORS: dict[type[nn.Module], dict[str, tuple[str, int]]] = {
    nn.Linear: {"out_features": ("weight", 0), "in_features": ("weight", 1)},
    nn.Bilinear: {"out_features": ("weight", 0), "in1_features": ("weight", 1), "in2_features": ("weight", 2)},
    nn.Embedding: {"num_embeddings": ("weight", 0), "embedding_dim": ("weight", 1)},
    nn.modules.batchnorm._NormBase: {"num_features": ("weight", 0)},
    nn.GroupNorm: {"num_channels": ("weight", 0)},
    nn.PReLU: {"num_parameters": ("weight", 0)},
    nn.RNNBase: {"input_size": ("weight_ih_l0", 1), "hidden_size": ("weight_hh_l0", 1)},
    nn.RNNCellBase: {"input_size": ("weight_ih", 1), "hidden_size": ("weight_hh", 1)},
}


def _mirrors(model: nn.Module) -> Iterable[Callable[[], None]]:
    """Attributes of torch's own modules that say the shape of a weight and are not read in forward."""
    undo = []
    for module in model.modules():
        wanted: dict[str, int] = {}
        for kind, table in MIRRORS.items():
            if isinstance(module, kind):
                for attribute, (key, dim) in table.items():
                    tensor = getattr(module, key, None)
                    tensor = getattr(module, "running_mean", None) if tensor is None else tensor
                    if attribute == "hidden_size" and getattr(module, "proj_size", 0):
                        continue  # then the weight has the size of the projection
                    if tensor is not None and isinstance(getattr(module, attribute, None), int):
                        wanted[attribute] = tensor.shape[dim]
        if isinstance(module, nn.modules.conv._ConvNd):
            a, b = (1, 0) if module.transposed else (0, 1)
            wanted["out_channels"] = module.weight.shape[a] * (module.groups if module.transposed else 1)
            wanted["in_channels"] = module.weight.shape[b] * (1 if module.transposed else module.groups)
        for attribute, value in wanted.items():
            if getattr(module, attribute) != value:
                undo.append(_set(vars(module), attribute, -1, value))
    return undo


def mask_(model: nn.Module, cut: Cut) -> Callable[[], None]:
    """Set to zero what would be cut. Returns what undoes it."""
    undo: list[Callable[[], None]] = []
    done: set[int] = set()
    for name, tensor in tensors_of(model).items():
        if name not in cut.kept or id(tensor) in done or not tensor.is_floating_point():
            continue
        done.add(id(tensor))
        before = tensor.data
        undo.append(_restore(tensor, before, tensor.grad))
        masked = before.clone()
        for dim, indices in cut.kept[name].items():
            gone = torch.ones(before.shape[dim], dtype=torch.bool, device=before.device)
            gone[torch.from_numpy(indices).to(before.device)] = False
            masked.index_fill_(dim, gone.nonzero()[:, 0], 0)
        tensor.data = masked
    return lambda: _all(undo)
