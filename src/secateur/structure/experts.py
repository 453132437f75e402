"""Whole experts that go.

Routing depends on data, and no trace sees which expert belongs to which row of the router: so this is a rule. Stacked
weights [experts, ..], the rows of their router, and vectors with an entry for each expert go together. Right is a cut that
computes what the model computes when the router gives the removed experts a logit of minus infinity.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import SecateurError
from secateur.forward import no_cache
from secateur.structure.proof import Wrong, difference, returned
from secateur.structure.running import Inputs, evaluating, runner
from secateur.structure.sizes import Values, owners, table_of
from secateur.structure.surgery import Cut, cut_
from secateur.structure.watch import tensors_of
from secateur.weights.layers import all_layers

TOLERANCE = 1e-4
Kept = Mapping[str, NDArray[np.int64]]  # name of a mixture -> the experts that stay


@dataclass(frozen=True)
class Mixture:
    """A layer of experts. tensors: names, with the dimension that counts experts. groups: of which as many have to stay."""

    name: str
    count: int
    stacks: tuple[str, ...]
    routers: tuple[str, ...]
    tensors: tuple[tuple[str, int], ...]
    chosen: int
    groups: int


def mixtures(model: nn.Module) -> list[Mixture]:
    """Every layer of stacked experts that has a router."""
    homes: dict[str, list[str]] = {}
    for layer, _ in all_layers(model):
        if layer.kind == "expert":
            homes.setdefault(layer.parameter.rpartition(".")[0], []).append(layer.parameter)
    found = []
    for home, names in homes.items():
        stacks = tuple(dict.fromkeys(names))
        count = model.get_parameter(stacks[0]).shape[0]
        block = home.rpartition(".")[0]
        mixture = _mixture(model, block, home, stacks, count)
        if mixture is not None:
            found.append(mixture)
    return found


def _mixture(model: nn.Module, block: str, home: str, stacks: tuple[str, ...], count: int) -> Mixture | None:
    within = {name: tensor for name, tensor in tensors_of(model).items() if name.startswith(f"{block}.")}
    own = [n for n, t in within.items() if n.startswith(f"{home}.") and t.ndim > 1 and t.shape[0] == count]
    outside = {name: tensor for name, tensor in within.items() if not name.startswith(f"{home}.")}
    routers = [name for name, tensor in outside.items() if tensor.ndim == 2 and tensor.shape[0] == count]
    named = [name for name in routers if re.search(r"\b(gate|router|wg)\b", name)]
    routers = named if len(routers) > 1 else routers
    if len(routers) != 1:
        return None
    vectors = [(n, t.shape.index(count)) for n, t in outside.items() if t.numel() == count and count in t.shape]
    groups = _number(model, block, ("n_group", "num_expert_group")) or 1
    chosen = _number(model, block, ("top_k", "num_experts_per_tok", "moe_top_k")) or 1
    tensors = (*((name, 0) for name in (*own, *routers)), *vectors)
    return Mixture(block, count, stacks, tuple(routers), tensors, chosen, groups)


def _number(model: nn.Module, block: str, names: Sequence[str]) -> int | None:
    """An integer of the layer's modules, or of the model's config."""
    holders = [*model.get_submodule(block).modules(), getattr(model, "config", None)]
    for holder in holders:
        for name in names:
            if isinstance(value := getattr(holder, name, None), int) and value > 0:
                return value
    return None


def expert_scores(model: nn.Module, batches: Sequence[Inputs]) -> dict[str, dict[str, Tensor]]:
    """Mixture -> "usage" (share of the tokens that an expert sees) and "contribution" (norm of what it adds, summed over
    tokens): [experts] each. The experts have to be computed one by one (`make_observable`).
    """
    watched = mixtures(model)
    with evaluating(model), torch.no_grad(), _Count(model, watched) as count:
        for batch in batches:
            runner(model, {**no_cache(model), **batch} if isinstance(batch, Mapping) else batch)()
    return {
        mixture.name: {
            "usage": count.tokens[mixture.name] / max(float(count.tokens[mixture.name].sum()), 1.0),
            "contribution": count.norms[mixture.name],
        }
        for mixture in watched
    }


class _Count(TorchDispatchMode):
    """Counts tokens at the experts' products, and the norms of what is added to the layer's output."""

    def __init__(self, model: nn.Module, watched: Sequence[Mixture]) -> None:
        super().__init__()
        self.tokens = {m.name: torch.zeros(m.count, dtype=torch.float64) for m in watched}
        self.norms = {m.name: torch.zeros(m.count, dtype=torch.float64) for m in watched}
        self._first = {model.get_parameter(m.stacks[0]).untyped_storage().data_ptr(): m for m in watched}
        self._strides = {m.name: model.get_parameter(m.stacks[0]).stride(0) for m in watched}
        self._last: tuple[str, int] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in ("mm", "addmm"):
            x, weight = args[-2:]
            mixture = self._first.get(weight.untyped_storage().data_ptr())
            if mixture is not None:
                expert = weight.storage_offset() // self._strides[mixture.name]
                self.tokens[mixture.name][expert] += len(x)
                self._last = (mixture.name, expert)
        elif name.startswith("index_add") and self._last is not None:
            where, expert = self._last
            self.norms[where][expert] += float(args[3].float().norm(dim=-1).sum())
            self._last = None
        return func(*args, **(kwargs or {}))


def keep_experts(found: Sequence[Mixture], scores: Mapping[str, Tensor], left: int) -> dict[str, NDArray[np.int64]]:
    """The experts with the highest scores, equally many of each group. Raises SecateurError for a number that cannot be."""
    if not found:
        raise SecateurError("this model has no stacked experts with a router: no experts can be removed")
    kept = {}
    for mixture in found:
        if not mixture.chosen <= left < mixture.count or left % mixture.groups:
            of = f", a multiple of {mixture.groups}" if mixture.groups > 1 else ""
            raise SecateurError(
                f"{mixture.name} has {mixture.count} experts of which each token takes {mixture.chosen}: {left} cannot be "
                f"left; expected {mixture.chosen} to {mixture.count - 1}{of}"
            )
        table = scores[mixture.name].double().view(mixture.groups, -1)
        order = table.argsort(dim=1, descending=True, stable=True)[:, : left // mixture.groups]
        order = order + torch.arange(mixture.groups)[:, None] * table.shape[1]
        kept[mixture.name] = np.sort(order.flatten().numpy())
    return kept


def experts_cut(model: nn.Module, found: Sequence[Mixture], kept: Kept) -> Cut:
    """What remains when only some experts do: tensors, and the integers called after experts that count them."""
    tensors = {name: {dim: kept[m.name]} for m in found if m.name in kept for name, dim in m.tensors}
    values: Values = {}
    sizes = {m.count: len(kept[m.name]) for m in found if m.name in kept}
    for number, (path, owner) in enumerate(owners(model)):
        inside = not isinstance(owner, nn.Module) or any(f"{path}.".startswith(f"{name}.") for name in kept)
        for name, value in table_of(owner).items():
            if inside and type(value) is int and value in sizes and "expert" in name and "per_tok" not in name:
                values[(number, name, -1)] = sizes[value]
    return Cut(tensors, [values])


def check_experts(model: nn.Module, found: Sequence[Mixture], kept: Kept, run: Callable[[], Any]) -> float:
    """The relative difference of the cut model and the one whose router never takes the removed experts. Raises Wrong."""
    with torch.no_grad():
        with _without(model, found, kept):
            want = returned(run())
        undo = cut_(model, experts_cut(model, found, kept))
        try:
            got = returned(run())
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise Wrong(f"the model does not run without these experts: {error}") from None
        finally:
            undo()
    return difference(want, got)


class _without(TorchFunctionMode):
    """Routers give removed experts a logit of minus infinity; a bias that only chooses is as low."""

    def __init__(self, model: nn.Module, found: Sequence[Mixture], kept: Kept) -> None:
        super().__init__()
        tensors = tensors_of(model)
        self._removed: dict[int, Tensor] = {}
        self._biases: list[tuple[Tensor, Tensor]] = []
        for mixture in found:
            if mixture.name not in kept:
                continue
            gone = torch.from_numpy(np.setdiff1d(np.arange(mixture.count), kept[mixture.name]))
            for name in mixture.routers:
                self._removed[id(tensors[name])] = gone
            for name, _ in mixture.tensors:
                if tensors[name].numel() == mixture.count and "correction" in name:
                    self._biases.append((tensors[name], gone))

    def __enter__(self) -> Any:
        self._before = [(tensor, tensor.data) for tensor, _ in self._biases]
        for tensor, gone in self._biases:
            tensor.data = tensor.data.flatten().index_fill(0, gone, float("-inf")).view(tensor.shape)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        for tensor, data in self._before:
            tensor.data = data
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and (gone := self._removed.get(_identity(args[1]))) is not None:
            return out.index_fill(-1, gone, float("-inf"))
        return out


def _identity(weight: Tensor) -> int:
    """A router may cast its weight first."""
    return id(weight if weight._base is None else weight._base)
