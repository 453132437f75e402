"""Norms over fewer elements: a factor for each of them, so that what stays keeps its size.

A norm divides by the energy of all that it is given. Where some of that is removed, it divides by the energy of the rest,
and what stays comes out larger or smaller than it was. One factor for each norm, fitted on data, puts that right, and goes
into the norm's weight.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.structure.plans import Plan, indices_of
from secateur.structure.running import Inputs, run_all
from secateur.structure.watch import tensors_of

FEW = 1e-6  # a factor this close to 1 is none: the norm of a batch, which does not mix what it is given


def norm_factors(model: nn.Module, plan: Plan, batches: Sequence[Inputs]) -> dict[str, float]:
    """Name of the weight of a norm -> the factor c that is the least-squares fit of c norm'(x') to norm(x) where x' is what
    the plan leaves of x, biases apart. model: as it is before the plan is applied. Norms whose outputs do not follow their
    weight, element by element, have none.
    """
    found = {name: _Fit(model.get_submodule(name), _cut(model, name, plan), kept) for name, kept in _norms(model, plan)}
    handles = [model.get_submodule(name).register_forward_hook(fit, with_kwargs=True) for name, fit in found.items()]
    run_all(model, batches, handles)
    return {f"{name}.weight": fit.factor for name, fit in found.items() if abs(fit.factor - 1) > FEW}


def rescale_(model: nn.Module, factors: Mapping[str, float]) -> None:
    """Multiply what norms return by factors. model: after the plan was applied."""
    done: set[int] = set()
    with torch.no_grad():
        for name, factor in factors.items():
            if id(model.get_parameter(name)) in done:  # norms that share a weight
                continue
            done.add(id(model.get_parameter(name)))
            offset = _offset(model.get_submodule(name.rpartition(".")[0])) or 0.0
            weight = model.get_parameter(name)
            weight.copy_((weight + offset) * factor - offset)


def _norms(model: nn.Module, plan: Plan) -> list[tuple[str, Tensor]]:
    """Modules with vectors alone, of which the plan cuts `weight`: name, and the indices that stay."""
    found = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters())
        change = plan.tensors.get(f"{name}.weight")
        if change is None or any(p.ndim != 1 for p in own.values()) or _offset(module) is None:
            continue
        found.append((name, torch.from_numpy(indices_of(change.kept[0]))))
    return found


def _cut(model: nn.Module, name: str, plan: Plan) -> nn.Module:
    """A copy of a norm as the plan leaves it."""
    module = copy.deepcopy(model.get_submodule(name))
    for inner, tensor in tensors_of(module).items():
        change = plan.tensors.get(f"{name}.{inner}")
        if change is not None:
            tensor.data = tensor.data[torch.from_numpy(indices_of(change.kept[0])).to(tensor.device)]
    for attribute in plan.attributes:
        if attribute.owner == name:
            before = vars(module)[attribute.name]
            after: Any = attribute.after
            if attribute.place >= 0:
                after = tuple(after if place == attribute.place else size for place, size in enumerate(before))
            setattr(module, attribute.name, after)
    return module


def _offset(module: nn.Module) -> float | None:
    """What a norm adds to its weight before it multiplies with it: 0, or 1 (Gemma); None for what is no such norm."""
    weight = dict(module.named_parameters()).get("weight")
    if weight is None:
        return None
    probe = copy.deepcopy(module).double()
    x = torch.randn(2, 3, len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answers = []
    with torch.no_grad():
        for value in (0.0, 1.0, 2.0):
            for name, parameter in probe.named_parameters():
                parameter.fill_(value if name == "weight" else 0.0)
            try:
                out = probe(x.to(weight.device))
            except (RuntimeError, TypeError, ValueError, LookupError):
                return None
            if not isinstance(out, Tensor) or out.shape != x.shape:
                return None
            answers.append(out.double())
    slope = answers[1] - answers[0]
    if not torch.allclose(answers[2] - answers[1], slope, atol=1e-5) or not slope.any():
        return None
    share = float((answers[0] * slope).sum() / slope.square().sum())
    return next((known for known in (0.0, 1.0) if abs(share - known) < 1e-4), None)


class _Fit:
    """Least squares of the whole norm on the cut one, summed over calls."""

    def __init__(self, whole: nn.Module, cut: nn.Module, kept: Tensor) -> None:
        self._cut, self._kept = cut, kept
        self._bias = dict(whole.named_parameters()).get("bias")
        self._above = self._below = 0.0

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        kept = self._kept.to(output.device)
        bias = 0.0 if self._bias is None else self._bias[kept]
        width = output.shape[-1]

        def less(value: Any) -> Any:  # a gate has the width of what is normalized
            return value[..., kept] if isinstance(value, Tensor) and value.shape[-1:] == (width,) else value

        have = self._cut(*map(less, args), **{key: less(value) for key, value in kwargs.items()}) - bias
        want = output[..., kept] - bias
        self._above += float((want.double() * have.double()).sum())
        self._below += float(have.double().square().sum())

    @property
    def factor(self) -> float:
        """1 for a norm that nothing passed."""
        return self._above / self._below if self._below > 0 else 1.0
