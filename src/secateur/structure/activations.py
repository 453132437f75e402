"""What the units of couplings are worth to those who read them: moments of activations at the input of every parameter.

The model runs again under the watch of `trace`, so that modules, raw parameters, einsum and experts are all seen: whatever
is multiplied with a parameter along one of its dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.forward import no_cache
from secateur.structure.couplings import Couplings
from secateur.structure.running import runner
from secateur.structure.watch import Facts, Watch, another_run, located, plainly


@dataclass
class Moments:
    """Sums over tokens, for each index of a dimension: [indices], or [units, indices] of `at`."""

    tokens: int
    absolute: Tensor
    first: Tensor
    second: Tensor

    @property
    def mean_abs(self) -> Tensor:
        """E|x|."""
        return self.absolute / self.tokens

    @property
    def variance(self) -> Tensor:
        """E[x^2] - E[x]^2."""
        return (self.second / self.tokens - (self.first / self.tokens).square()).clamp(min=0)

    @property
    def norm(self) -> Tensor:
        """The root of the summed squares, as in Wanda."""
        return self.second.sqrt()

    def at(self, indices: Tensor) -> Moments:
        """The moments of some indices."""
        return Moments(self.tokens, self.absolute[indices], self.first[indices], self.second[indices])


class Read(Watch):
    """Sums up what parameters are multiplied with."""

    def __init__(self, model: nn.Module, facts: Facts) -> None:
        super().__init__(model, another_run(facts))
        self.moments: dict[tuple[str, int], Moments] = {}
        self._owners: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            self._owners.setdefault(parameter.untyped_storage()._cdata, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in ("mm", "bmm", "_grouped_mm"):
            self._product(args[0], args[1])
        elif name in ("addmm", "baddbmm"):
            self._product(args[1], args[2])
        elif name == "convolution" and args[8] == 1:
            self._add(args[1], 0 if args[6] else 1, args[0].movedim(1, -1))
        return out

    def _product(self, left: Tensor, right: Tensor) -> None:
        self._add(right, right.ndim - 2, left)
        self._add(left, left.ndim - 1, right.mT)

    def _add(self, weight: Tensor, place: int, x: Tensor) -> None:
        """x [.., tokens, in] meets a view of a parameter along one of its dimensions."""
        name = self._owners.get(weight.untyped_storage()._cdata)
        if name is None:
            return
        dim = self.dims_of(weight)[place]
        places = [i for i, own in enumerate(self.facts.dims[name]) if own is not None and own is dim]
        if len(places) != 1:
            return
        x = x.reshape(-1, x.shape[-1]).float()
        found = self.moments.get((name, places[0]))
        if found is None:
            zeros = torch.zeros(3, x.shape[1], device=x.device)
            found = self.moments[(name, places[0])] = Moments(0, *zeros.unbind())
        found.tokens += len(x)
        found.absolute += x.abs().sum(0)
        found.first += x.sum(0)
        found.second += x.square().sum(0)


def activations(couplings: Couplings, batches: Sequence[Any]) -> Mapping[tuple[str, int], Moments]:
    """(parameter, dimension) -> the moments of what it was multiplied with, over all batches."""
    model = couplings.model
    read = Read(model, couplings.facts)
    for batch in batches:
        run = runner(model, {**no_cache(model), **batch} if isinstance(batch, Mapping) else batch)
        with plainly(model), located(model, read.where), read:
            run()
    return read.moments
