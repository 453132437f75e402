"""ADMM on the layer reconstruction problem: min ||X w - X w_dense||^2 over sparse w, for a whole layer at once."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.weights.granularity import Choose
from secateur.weights.refit import solve_supported
from secateur.weights.stats import Inputs

FIRST_PENALTY = 0.1  # of the constraint, on a problem whose diagonal is 1
GROWTH = 1.3  # of the penalty, each EVERY iterations
EVERY = 3
MOST, LEAST = 60, 20  # iterations
SETTLED = 3e-4  # share of the mask that still changes between two looks: done
POLISH = 15  # conjugate gradient steps on the final mask


def admm_matrix(weight: Tensor, inputs: Inputs, group: int, choose: Choose, damp: float) -> tuple[Tensor, Tensor]:
    """weight: [out, in]; the choice is by |w_j| ||x_j||. Returns the new weight and the keep mask.

    Inputs are scaled to unit norm, so that one penalty suits all columns. It rises while the mask settles: small, the
    sparse copy follows the least-squares solution; large, both agree. Then the kept weights are refitted.
    """
    norm, values, vectors = inputs.spectrum(group, damp)
    dead = inputs.dead(group)  # their weights cost nothing: they go first, and those that stay do not change
    dense = (weight * norm).masked_fill(dead, 0)  # [out, in]
    if choose.fixed is not None:
        kept, keep = dense * choose.fixed, choose.fixed
    else:
        kept, keep = _alternate(dense, values, vectors, choose)
    system = (vectors * values) @ vectors.t()
    new = solve_supported(system, dense, keep, kept, POLISH if choose.fixed is None else 20 * POLISH) / norm
    return torch.where(dead, weight * keep, new), keep


def _alternate(dense: Tensor, values: Tensor, vectors: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
    """The relaxed weights at the end, masked, and the mask. values, vectors: spectrum of the scaled Gram matrix."""
    target = ((dense @ vectors) * values) @ vectors.t()  # [out, in]
    keep = choose(dense.abs())
    relaxed = sparse = dense * keep
    dual = torch.zeros_like(dense)
    penalty, looked = FIRST_PENALTY, keep
    inverse = (vectors / (values + penalty)) @ vectors.t()
    for iteration in range(1, MOST + 1):
        relaxed = (target - dual + penalty * sparse) @ inverse
        shifted = relaxed + dual / penalty
        keep = choose(shifted.abs())
        sparse = shifted * keep
        dual += penalty * (relaxed - sparse)
        if iteration % EVERY == 0:
            changed = float((keep != looked).float().mean())
            if changed < SETTLED and iteration >= LEAST:
                break
            looked, penalty = keep, penalty * GROWTH
            inverse = (vectors / (values + penalty)) @ vectors.t()
    keep = choose(relaxed.abs())
    return relaxed * keep, keep
