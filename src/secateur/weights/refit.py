"""Least-squares values for the weights that are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.weights.granularity import Choose
from secateur.weights.linalg import damped_


def refit_matrix(
    weight: Tensor, gram: Tensor, choose: Choose, damp: float, start: Tensor | None = None, iterations: int = 300
) -> tuple[Tensor, Tensor]:
    """min over w supported on the mask of (w - dense)' H (w - dense), H = gram + damping. weight: [out, in].

    Projected conjugate gradients with Jacobi preconditioning on all rows at once; `start` [out, in] is where they begin.
    `choose.fixed` has to hold the mask.
    """
    keep = choose.fixed
    assert keep is not None
    system = damped_(gram.clone(), damp)
    return solve_supported(system, weight, keep, weight if start is None else start, iterations), keep


def solve_supported(
    system: Tensor, dense: Tensor, keep: Tensor, start: Tensor, iterations: int, tolerance: float = 1e-6
) -> Tensor:
    """The minimiser of (w - dense)' system (w - dense) over w that are zero off `keep`, from `start`: [out, in]."""
    inverse = system.diagonal().reciprocal()
    w = start * keep
    residual = ((dense - w) @ system).mul_(keep)  # [out, in]
    scale = ((dense * keep) @ system).mul_(keep).square().mul_(inverse).sum(1) + 1e-30
    z = residual * inverse
    direction, rz = z, (residual * z).sum(1)
    for _ in range(iterations):
        if float((rz / scale).amax()) < tolerance**2:
            break
        image = (direction @ system).mul_(keep)
        curvature = (direction * image).sum(1)
        alpha = torch.where(curvature > 0, rz / curvature.clamp(min=1e-38), 0)[:, None]
        w = w + alpha * direction
        residual = residual - alpha * image
        z = residual * inverse
        rz, previous = (residual * z).sum(1), rz
        beta = torch.where(previous > 0, rz / previous.clamp(min=1e-38), 0)[:, None]
        direction = z + beta * direction
    return w
