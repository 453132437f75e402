"""Factorisations that always end: damping escalates by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.errors import SecateurError

DEAD = 1e-30  # sums of squares below it are as good as 0: their inverses have no squares in float32
MOST_DAMPING = 1e4  # relative to the mean of the diagonal: no finite Gram matrix needs as much


def damped_(matrix: Tensor, damp: float) -> Tensor:
    """Add damp * mean(diagonal) to the diagonal, in place; dead inputs count as the mean of the others. matrix: [n, n].

    (The published code counts them as 1: next to small inputs they then decide the damping.)
    """
    diagonal = matrix.diagonal()
    dead = diagonal < DEAD
    mean = diagonal.sum() / (~dead).sum()  # 0 / 0 when all of them are dead
    diagonal[dead] = 1 if bool(dead.all()) else mean
    diagonal += damp * diagonal.mean()
    return matrix


def inverse_factor(gram: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper R with R'R = (gram + damping)^-1, and the relative damping that it took.

    With J the reversal of the index order and L = chol(J H J), R = (J L J)^-1: one Cholesky factorization and one
    triangular inverse, half the flops of factorize, invert, factorize again. gram: [n, n] float32; it is reversed and
    damped in place to save memory, and left as it was. Raises SecateurError when it is not finite.
    """
    diagonal = gram.diagonal().clone()
    if not bool(torch.isfinite(diagonal).all()):
        raise SecateurError("the Gram matrix of the calibration inputs has NaN or Inf values")
    flip_(gram)
    try:
        while damp < MOST_DAMPING:
            gram.diagonal().copy_(diagonal.flip(0))
            lower, info = torch.linalg.cholesky_ex(damped_(gram, damp))
            if info == 0 and bool(torch.isfinite(lower.diagonal()).all()):
                invert_lower_(lower)
                if max(abs(float(edge)) for edge in lower.mT.aminmax()) < 1e18:  # false for NaN and Inf too
                    return flip_(lower), damp
            damp = max(damp * 10, 1e-6)
    finally:
        flip_(gram).diagonal().copy_(diagonal)
    raise SecateurError("the Gram matrix of the calibration inputs has NaN or Inf values")


def spectrum(gram: Tensor, damp: float) -> tuple[Tensor, Tensor, Tensor, float]:
    """Scale a Gram matrix to a unit diagonal and decompose it: (norm [n], eigenvalues + damping [n], eigenvectors
    [n, n], the damping). norm is the root of the diagonal, 1 where an input was never non-zero.
    """
    diagonal = gram.diagonal()
    norm = torch.where(diagonal > 0, diagonal, 1).sqrt()
    scaled = gram / norm / norm[:, None]
    if not bool(torch.isfinite(scaled).all()):
        raise SecateurError("the Gram matrix of the calibration inputs has NaN or Inf values")
    scaled.diagonal()[diagonal <= 0] = 1
    try:
        values, vectors = torch.linalg.eigh(scaled)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]  # did not converge in float32
        values, vectors = (part.to(scaled) for part in torch.linalg.eigh(scaled.cpu().double()))
    while float(values[0]) + damp < 1e-5:  # rounding can leave small negative eigenvalues
        damp = max(damp * 10, 1e-5)
    return norm, values + damp, vectors, damp


def flip_(matrix: Tensor) -> Tensor:
    """Reverse the order of both indices, in place and row by row: [n, n]."""
    n = matrix.shape[0]
    half, chunk = n // 2, 256
    for start in range(0, half, chunk):
        stop = min(start + chunk, half)
        upper = matrix[start:stop].flip(0, 1)
        matrix[start:stop] = matrix[n - stop : n - start].flip(0, 1)
        matrix[n - stop : n - start] = upper
    if n % 2:
        matrix[half] = matrix[half].flip(0)
    return matrix


def invert_lower_(lower: Tensor, leaf: int = 256) -> Tensor:
    """Invert a lower triangular matrix in place, by halves: almost all of the work is matrix products, which skip what is
    zero and go a stripe at a time, so that they need no memory to speak of. [n, n].
    """
    n = lower.shape[0]
    if n <= leaf:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return lower
    half = (n // 2 + leaf - 1) // leaf * leaf if n > 2 * leaf else n // 2
    first, corner, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    invert_lower_(first, leaf)
    invert_lower_(second, leaf)
    for start in reversed(range(0, n - half, leaf)):  # second @ corner: a row depends on itself and those above it
        stop = min(start + leaf, n - half)
        corner[start:stop] = second[start:stop, :stop] @ corner[:stop]
    for start in range(0, half, leaf):  # corner @ first: a column depends on itself and those to the right
        stop = min(start + leaf, half)
        corner[:, start:stop] = corner[:, start:] @ first[start:, start:stop]
    corner.neg_()
    return lower
