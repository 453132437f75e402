"""Derivatives of the loss with respect to weights, summed over batches: what taylor, fisher and obd read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.errors import SecateurError

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Derivatives:
    """Sums over `samples` batches, of the parameter's shape; None where the loss of no batch depends on the parameter."""

    samples: int = 0
    gradient: Tensor | None = None
    squares: Tensor | None = None
    curvature: Tensor | None = None


def derivatives(
    model: nn.Module,
    parameters: Sequence[str],
    batches: Iterable[Any],
    loss: Loss,
    needs: frozenset[str],
    probes: int,
    seed: int,
    each: Callable[[int], None] | None = None,
) -> Mapping[str, Derivatives]:
    """Parameter name -> Derivatives. needs: of "gradient", "fisher", "curvature".

    The diagonal of the Hessian is estimated by Hutchinson's probes, E[z * Hz] with z = +-1: exact where the Hessian is
    diagonal, unbiased elsewhere. Raises SecateurError when the loss is not a finite scalar or depends on no parameter.
    """
    weights = [model.get_parameter(name) for name in parameters]
    found = {name: _zeros(weight, needs) for name, weight in zip(parameters, weights, strict=True)}
    generator = torch.Generator().manual_seed(seed)
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the only attention with second derivatives
            for index, batch in enumerate(batches):
                value = loss(model, batch)
                if value.numel() != 1:
                    raise SecateurError(f"the loss has shape {list(value.shape)}; expected a scalar: a mean or a sum")
                if not value.requires_grad:
                    raise SecateurError(
                        "the loss depends on no weight that is to be pruned; compute it from the model's output, "
                        "without torch.no_grad, detach or item"
                    )
                if not bool(torch.isfinite(value)):
                    raise SecateurError(
                        f"the loss of calibration batch {index} is {float(value.detach())}; expected a finite one"
                    )
                _add(found, parameters, weights, value, needs, probes, generator)
                if each is not None:
                    each(index)
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    return found


def _add(
    found: Mapping[str, Derivatives],
    names: Sequence[str],
    weights: list[nn.Parameter],
    loss: Tensor,
    needs: frozenset[str],
    probes: int,
    generator: torch.Generator,
) -> None:
    second = "curvature" in needs
    gradients = torch.autograd.grad(loss, weights, create_graph=second, allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        into = found[name]
        into.samples += 1
        if gradient is None:
            continue
        if into.gradient is not None:
            into.gradient += gradient.detach()
        if into.squares is not None:
            into.squares += gradient.detach().float().square()
    if second:
        used = [
            (name, w, g)
            for name, w, g in zip(names, weights, gradients, strict=True)
            if g is not None and g.requires_grad
        ]
        for probe in range(probes if used else 0):  # a gradient that needs none itself is constant: no curvature
            signs = [_signs(w, generator) for _, w, _ in used]
            products = torch.autograd.grad(
                [g for _, _, g in used],
                [w for _, w, _ in used],
                grad_outputs=signs,
                retain_graph=probe + 1 < probes,
                allow_unused=True,
            )
            for (name, _, _), sign, product in zip(used, signs, products, strict=True):
                total = found[name].curvature
                if product is not None and total is not None:
                    total += sign * product / probes


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, like.shape, generator=generator).to(like.device, like.dtype) * 2 - 1


def _zeros(weight: Tensor, needs: frozenset[str]) -> Derivatives:
    """Sums of nothing yet, for what is asked; a parameter that the loss does not depend on keeps them."""
    gradient, squares, curvature = (
        torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) if name in needs else None
        for name in ("gradient", "fisher", "curvature")
    )
    return Derivatives(0, gradient, squares, curvature)
