"""The masks are those of the authors' own SparseGPT and Wanda, exact ties aside.

`golden/masks.json` holds masks that their published code made (see its note); `sparsegpt` below is the same algorithm in
our words, for as many more inputs as we like. Both keep what the published code does differently:

- its threshold `<=` the k-th of the sorted scores removes k + 1 weights of every block, ours removes k; `AsPublished`
  makes our sweep threshold the same way;
- it counts a dead input as 1 on the diagonal, whatever the others are, ours as their mean; `problem` scales inputs so
  that this mean is 1;
- it zeroes the weights of dead inputs, whether the mask removes them or not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from problems import DAMP, seen
from secateur.weights.granularity import Choose, parse
from secateur.weights.stats import Stats
from secateur.weights.update import UPDATES

GOLDEN = Path(__file__).parent / "golden/masks.json"
AMOUNTS = ["0.5", "0.6", "0.7", "2:4", "4:8"]
DEAD = (3, 130, 269)


def problem(out: int, width: int, seed: int, dead: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Weights [out, width] and correlated inputs [2 * width, width], the same on every machine; the mean of the diagonal
    of 2 X'X (the published Hessian of one sample) is 1 over the inputs that live.
    """
    random = np.random.RandomState(seed)  # its stream is frozen for good
    weight, z = random.randn(out, width), random.randn(2 * width, width)
    x = z + 0.8 * np.roll(z, 1, axis=1) - 0.4 * np.roll(z, 5, axis=1) + 0.7 * random.randn(2 * width, 1)
    x = x * np.exp(random.randn(width) / 2)
    x[:, list(dead)] = 0
    x /= np.sqrt(2 * (x**2).sum() / (width - len(dead)))
    return torch.from_numpy(weight).float(), torch.from_numpy(x).float()


def sparsegpt(weight: Tensor, x: Tensor, amount: str, fewer: int = 0) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv:2301.00774 as published: weights and mask (True = kept). fewer: to lower k by."""
    w, h = weight.clone(), 2 * x.t() @ x
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += DAMP * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    r = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    gone = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], 128):
        stop = min(start + 128, w.shape[1])
        if ":" not in amount:
            scores = (w[:, start:stop] / r.diagonal()[start:stop]) ** 2
            edge = scores.flatten().sort().values[int(scores.numel() * float(amount)) - fewer]
            gone[:, start:stop] = scores <= edge
        errors = torch.zeros_like(w[:, start:stop])
        for j in range(start, stop):
            if ":" in amount and j % int(amount[-1]) == 0:
                group = slice(j, j + int(amount[-1]))
                scores = (w[:, group] / r.diagonal()[group]) ** 2
                gone[:, group] = scores.argsort(dim=1, stable=True).argsort(dim=1) < int(amount[-1]) - int(amount[0])
            errors[:, j - start] = w[:, j] * gone[:, j] / r[j, j]
            w[:, j:stop] -= errors[:, j - start, None] * r[j, j:stop]
            w[gone[:, j], j] = 0
        w[:, stop:] -= errors @ r[start:stop, stop:]
    return w, ~gone


@dataclass(frozen=True)
class AsPublished(Choose):
    """Removes what is at most the k-th of the sorted scores, counted from 0."""

    def between(self, scores: Tensor, start: int, stop: int) -> Tensor:
        return scores > scores.flatten().sort().values[int(scores.numel() * self.sparsity)]


def choice(amount: str, kind: type[Choose] = AsPublished) -> Choose:
    return Choose(parse(amount)) if ":" in amount else kind(parse("layer"), float(amount))


def ours(
    weight: Tensor, x: Tensor, choose: Choose, update: str = "sparsegpt", by: str = "obs"
) -> tuple[Tensor, Tensor]:
    inputs = seen(x)
    if x.dtype == torch.float64:  # rounding decides no near tie; a single one would change every choice after it
        inputs.gram = (x.t() @ x)[None]
    return UPDATES[update].solve(weight, Stats(inputs, damp=DAMP, rows=len(weight)), choose, by)


def unpacked(code: str, shape: tuple[int, int]) -> Tensor:
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(code), dtype=np.uint8))
    return torch.from_numpy(bits[: shape[0] * shape[1]].reshape(shape)).bool()


@pytest.fixture(scope="module")
def golden() -> dict[str, str]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))["masks"]


def golden_problem(dead: str) -> tuple[Tensor, Tensor]:
    return problem(8, 272, seed=0, dead=DEAD if dead else ())


@pytest.mark.parametrize("dead", ["", " dead"])
@pytest.mark.parametrize("amount", AMOUNTS)
def test_sparsegpt_has_the_authors_masks(amount: str, dead: str, golden: dict[str, str]):
    weight, x = golden_problem(dead)
    expected = unpacked(golden[f"sparsegpt {amount}{dead}"], weight.shape)
    _, keep = ours(weight, x, choice(amount))
    assert torch.equal(keep, expected)
    _, keep = ours(weight.double(), x.double(), choice(amount))
    assert torch.equal(keep, expected)
    _, keep = sparsegpt(weight.double(), x.double(), amount)
    assert torch.equal(keep, expected), "the algorithm in our words is not theirs"


@pytest.mark.parametrize("dead", ["", " dead"])
@pytest.mark.parametrize("amount", AMOUNTS)
def test_wanda_has_the_authors_masks(amount: str, dead: str, golden: dict[str, str]):
    weight, x = golden_problem(dead)
    choose = Choose(parse(amount)) if ":" in amount else Choose(parse("per-row"), float(amount))
    found, keep = ours(weight, x, choose, "none", "wanda")
    assert torch.equal(keep, unpacked(golden[f"wanda {amount}{dead}"], weight.shape))
    assert torch.equal(found, weight * keep)


@pytest.mark.parametrize("dead", [(), DEAD])
@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize(("out", "width", "seed"), [(20, 272, 1), (5, 400, 2), (40, 288, 3)])
def test_sparsegpt_has_the_masks_of_the_algorithm(out: int, width: int, seed: int, amount: str, dead: tuple[int, ...]):
    weight, x = (part.double() for part in problem(out, width, seed, dead))
    for kind, fewer in ((AsPublished, 0), (Choose, 1)):
        expected, mask = sparsegpt(weight, x, amount, fewer)
        found, keep = ours(weight, x, choice(amount, kind))
        assert torch.equal(keep, mask)
        found[:, list(dead)] = 0
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_the_published_threshold_removes_one_more_per_block():
    weight, x = problem(24, 272, seed=1)
    _, theirs = sparsegpt(weight, x, "0.5")
    _, mine = ours(weight, x, choice("0.5", Choose))
    assert int((~theirs).sum()) - int((~mine).sum()) == 3  # blocks of 128, 128 and 16 columns
