"""What calibration saw of a layer. Every statistic is a sum over tokens, so that ranks can add theirs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.weights.linalg import DEAD, inverse_factor, spectrum

SAMPLE, SAMPLE_PER_CALL = 256, 8  # tokens kept to measure reconstruction errors on
STRIPE = 512  # columns of a Gram matrix that are summed together


@dataclass
class Inputs:
    """What one input saw: shared by every layer that is fed the same tensor (q, k and v; gate and up).

    groups: 1, or the number of channel groups of a grouped convolution, each of which sees inputs of its own.
    """

    tokens: int = 0
    squares: Tensor | None = None  # [groups, in], sums of x^2
    gram: Tensor | None = None  # [groups, in, in], sums of x x'
    sample: list[Tensor] = field(default_factory=list, repr=False)  # some tokens themselves: [groups, few, in]
    damping: float | None = None  # what the factor needed in the end, relative to the mean of the diagonal
    _factors: dict[float, Tensor] = field(default_factory=dict, repr=False)
    _spectra: dict[tuple[int, float], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def add(self, x: Tensor, gram: bool) -> None:
        """Add tokens x [groups, tokens, in] to the sums, in float32."""
        x = x.float()
        groups, tokens, width = x.shape
        if self.squares is None:
            self.squares = torch.zeros(groups, width, device=x.device)
            self.gram = torch.zeros(groups, width, width, device=x.device) if gram else None
        self.tokens += tokens
        if sum(kept.shape[1] for kept in self.sample) < SAMPLE:
            spread = torch.linspace(0, tokens - 1, min(tokens, SAMPLE_PER_CALL), dtype=torch.float64).long()
            self.sample.append(x[:, spread].clone())
        self.squares += x.square().sum(1)
        if self.gram is not None:
            for start, stop in _stripes(width):  # a Gram matrix is symmetric: half of it is enough
                self.gram[:, start:, start:stop].baddbmm_(x[:, :, start:].mT, x[:, :, start:stop])

    def complete(self) -> None:
        """Fill the half of the Gram matrix that `add` leaves out; for when all tokens are in."""
        if self.gram is not None:
            for start, stop in _stripes(self.gram.shape[-1]):
                self.gram[:, start:stop, stop:] = self.gram[:, stop:, start:stop].mT

    def dead(self, group: int) -> Tensor:
        """True for the inputs that were never other than 0, or as good as that: [in]."""
        assert self.squares is not None
        return self.squares[group] < DEAD

    def spectrum(self, group: int, damp: float) -> tuple[Tensor, Tensor, Tensor]:
        """(norm [in], eigenvalues [in], eigenvectors [in, in]) of the Gram matrix scaled to a unit diagonal and damped.

        norm is what weights are to be multiplied with; dead inputs have norm 1.
        """
        if (group, damp) not in self._spectra:
            *found, used = spectrum(self._collected()[group], damp)
            self._spectra[group, damp] = (found[0], found[1], found[2])
            self.damping = max(used, self.damping or 0.0)
        return self._spectra[group, damp]

    def _collected(self) -> Tensor:
        if self.gram is None:
            raise SecateurError("no Gram matrix was collected for this layer; use an update that needs none")
        return self.gram

    def factor(self, damp: float) -> Tensor:
        """Upper R [groups, in, in] with R'R = (gram + damp * mean(diagonal) I)^-1; kept for the layers that share it.

        Dead inputs (never non-zero) count as the mean of the others. The damping grows until the factor exists.
        """
        if damp not in self._factors:
            factors = []
            for gram in self._collected():
                factor, used = inverse_factor(gram, damp)
                factors.append(factor)
                self.damping = max(used, self.damping or 0.0)
            self._factors = {damp: torch.stack(factors) if len(factors) > 1 else factors[0][None]}
        return self._factors[damp]

    def output_change(self, before: Tensor, after: Tensor) -> float | None:
        """||X (after - before)'||^2 / ||X before'||^2 on the kept tokens; weights [out, in]. None without tokens."""
        if not self.sample:
            return None
        tokens = torch.cat(self.sample, dim=1)  # [groups, tokens, in]
        rows = zip(before.chunk(len(tokens)), (after - before).chunk(len(tokens)), tokens, strict=True)
        parts = [(float((x @ d.t()).square().sum()), float((x @ w.t()).square().sum())) for w, d, x in rows]
        return sum(change for change, _ in parts) / max(sum(size for _, size in parts), 1e-30)

    def release(self) -> None:
        """Forget everything of the size of a Gram matrix."""
        self.gram = None
        self._factors.clear()
        self._spectra.clear()


def _stripes(width: int) -> list[tuple[int, int]]:
    """Columns summed together; narrow matrices are not worth cutting."""
    step = STRIPE if width >= 2 * STRIPE else width
    return [(start, min(start + step, width)) for start in range(0, width, step)]


@dataclass
class Stats:
    """What calibration saw of one layer; a field is None unless the criterion or the update asked for it.

    gradient and friends are [out, in]: sums over `samples` of the loss's derivatives.
    """

    inputs: Inputs = field(default_factory=Inputs)
    gradient: Tensor | None = None  # sum of g
    gradient_squares: Tensor | None = None  # sum of g^2
    curvature_sum: Tensor | None = None  # sum of d2 loss / dw2
    samples: int = 0
    seed: int = 0
    damp: float = 0.01
    rows: int | None = None  # out, where inputs differ between groups of rows

    @property
    def _squares(self) -> Tensor:
        if self.inputs.squares is None:
            raise SecateurError("this criterion needs calibration inputs, and this layer saw none")
        return self.inputs.squares

    def _per_row(self, per_group: Tensor) -> Tensor:
        """[groups, in] -> [in], or [out, in] where there are several groups."""
        groups = per_group.shape[0]
        if groups == 1:
            return per_group[0]
        assert self.rows is not None
        return per_group.repeat_interleave(self.rows // groups, dim=0)

    @property
    def input_norm(self) -> Tensor:
        """||x_j||_2 over all tokens: [in] ([out, in] for grouped convolutions)."""
        return self._per_row(self._squares.sqrt())

    def column_sums(self, scores: Tensor) -> Tensor:
        """Sums over the rows that have inputs in common: [in] ([out, in] for grouped convolutions)."""
        return self._per_row(scores.unflatten(0, (len(self._squares), -1)).sum(1))

    @property
    def inverse_diagonal(self) -> Tensor:
        """[H^-1]_jj of the damped Gram matrix, infinite for dead inputs: [in] ([out, in] for grouped convolutions)."""
        diagonal = self.inputs.factor(self.damp).square().sum(1)
        return self._per_row(diagonal.masked_fill(self._squares < DEAD, torch.inf))

    @property
    def mean_gradient(self) -> Tensor:
        """Mean over samples of d loss / dw: [out, in]."""
        return _mean(self.gradient, self.samples)

    @property
    def fisher(self) -> Tensor:
        """Mean over samples of (d loss / dw)^2: [out, in]."""
        return _mean(self.gradient_squares, self.samples)

    @property
    def curvature(self) -> Tensor:
        """Mean over samples of d2 loss / dw2, at least 0: [out, in]."""
        return _mean(self.curvature_sum, self.samples).clamp(min=0)


def _mean(total: Tensor | None, samples: int) -> Tensor:
    if total is None or samples == 0:
        raise SecateurError("this criterion needs gradients of the loss, and none were collected")
    return total / samples
