"""Small layers with correlated inputs, and what float64 and brute force say about them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.weights.stats import Inputs, Stats

DAMP = 0.01


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int, *, seed: int = 0, dead: Sequence[int] = ()) -> Tensor:
    """Inputs [tokens, width] of different sizes that depend on each other; those in `dead` are 0."""
    x = noise(tokens, width, seed=seed) @ (noise(width, width, seed=seed + 1) / width**0.5 + torch.eye(width))
    x = x * (0.2 + 2 * torch.rand(width, generator=torch.Generator().manual_seed(seed + 2)))
    x[:, list(dead)] = 0
    return x


def seen(x: Tensor, gram: bool = True) -> Inputs:
    """What calibration keeps of x: [tokens, in] or [groups, tokens, in]."""
    inputs = Inputs()
    inputs.add(x if x.ndim == 3 else x[None], gram)
    inputs.complete()
    return inputs


def stats(x: Tensor, rows: int, damp: float = DAMP) -> Stats:
    return Stats(seen(x), damp=damp, rows=rows)


def gram(x: Tensor) -> Tensor:
    """X'X in float64."""
    return x.double().t() @ x.double()


def hessian(x: Tensor, damp: float = DAMP) -> Tensor:
    """X'X + damping in float64; dead inputs count as the mean of the others."""
    h = gram(x)
    dead = h.diagonal() == 0
    mean = float(h.diagonal()[~dead].mean()) if not bool(dead.all()) else 1.0
    return h + torch.diag(dead.double() * mean + damp * mean)


def error(weight: Tensor, dense: Tensor, system: Tensor) -> float:
    """(w - dense)' system (w - dense), summed over rows."""
    change = weight.double() - dense.double()
    return float(((change @ system) * change).sum())


def least_squares(dense: Tensor, system: Tensor, keep: Tensor) -> Tensor:
    """Row by row, the kept weights that minimize `error`: the normal equations in float64."""
    best = torch.zeros(dense.shape, dtype=torch.float64)
    for i, kept in enumerate(keep):
        target = system[kept] @ dense[i].double()
        best[i, kept] = torch.linalg.solve(system[kept][:, kept], target)
    return best


def inverse_rows(system: Tensor) -> list[Tensor]:
    """For each column j the first row of the inverse of system[j:, j:]: everything that OBS needs from left to right."""
    return [torch.linalg.inv(system[j:, j:])[0] for j in range(len(system))]


def random_mask(shape: tuple[int, int], share: float, seed: int = 0) -> Tensor:
    """True for about `share` of the weights."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
