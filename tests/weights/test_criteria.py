"""Every criterion against the same score in float64, written as loops over samples and weights; and what all promise.

A new criterion is covered by a row in ORACLES (and in OF_INPUTS, when it looks at the layer's inputs).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from problems import DAMP, correlated, noise, seen
from secateur.errors import SecateurError
from secateur.weights.criteria import CRITERIA
from secateur.weights.gradients import derivatives
from secateur.weights.granularity import Choose, parse
from secateur.weights.stats import Inputs, Stats

OUT, WIDTH, TOKENS, DEAD = 5, 7, 12, 2


class Elementwise(nn.Module):
    """A loss whose Hessian is diagonal, with curvature of both signs: there Hutchinson's estimate is exact."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.phase = torch.arange(len(weight))[:, None]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(self.weight * x + self.phase).sum() + (self.weight**4 * x).sum()


@dataclass
class Case:
    """weight [OUT, WIDTH] and x [TOKENS, WIDTH] in float64, and what calibration kept of float32 copies of them."""

    weight: Tensor
    x: Tensor
    stats: Stats

    @property
    def w(self) -> Tensor:
        return self.weight.float()

    def gradients(self) -> list[Tensor]:
        """Of the loss of each sample: [OUT, WIDTH]."""
        model = Elementwise(self.weight.clone())
        return [torch.autograd.grad(model(x), model.weight)[0] for x in self.x]

    def curvature(self) -> Tensor:
        """The mean over samples of the Hessian's diagonal, one weight at a time by double backward."""
        model, total = Elementwise(self.weight.clone()), torch.zeros_like(self.weight)
        for x in self.x:
            (first,) = torch.autograd.grad(model(x), model.weight, create_graph=True)
            for i in range(OUT):
                for j in range(WIDTH):
                    (second,) = torch.autograd.grad(first[i, j], model.weight, retain_graph=True)
                    total[i, j] += second[i, j]
        return total / len(self.x)

    def norm(self, j: int) -> float:
        return math.sqrt(sum(float(x) ** 2 for x in self.x[:, j]))


def make(seed: int = 0) -> Case:
    weight, x = noise(OUT, WIDTH, seed=seed), correlated(TOKENS, WIDTH, seed=seed, dead=[DEAD])
    weight[1, 3] = 0
    needs = frozenset({"gradient", "fisher", "curvature"})
    found = derivatives(Elementwise(weight.clone()), ["weight"], list(x), lambda m, b: m(b), needs, probes=1, seed=0)
    sums = found["weight"]
    stats = Stats(seen(x), sums.gradient, sums.squares, sums.curvature, sums.samples, seed=11, damp=DAMP, rows=OUT)
    return Case(weight.double(), x.double(), stats)


def each(score: Callable[[Case, int, int], float]) -> Callable[[Case], Tensor]:
    """One weight at a time."""
    return lambda c: torch.tensor([[score(c, i, j) for j in range(WIDTH)] for i in range(OUT)], dtype=torch.float64)


def taylor(c: Case) -> Tensor:
    total = torch.zeros_like(c.weight)
    for gradient in c.gradients():
        total += gradient
    return (c.weight * total / TOKENS).abs()


def fisher(c: Case) -> Tensor:
    total = torch.zeros_like(c.weight)
    for gradient in c.gradients():
        total += gradient**2
    return c.weight**2 * total / TOKENS / 2


def obs(c: Case) -> Tensor:
    """Invert H in float64; a dead input has no error to make up for."""
    live = [j for j in range(WIDTH) if j != DEAD]
    gram = c.x.t() @ c.x
    mean = sum(float(gram[j, j]) for j in live) / len(live)
    inverse = torch.linalg.inv(gram[live][:, live] + DAMP * mean * torch.eye(len(live), dtype=torch.float64))
    scores = torch.zeros_like(c.weight)
    for place, j in enumerate(live):
        scores[:, j] = c.weight[:, j] ** 2 / inverse[place, place]
    return scores


def ria(c: Case, i: int, j: int) -> float:
    size = c.weight.abs()
    column, row = sum(float(s) for s in size[:, j]), sum(float(s) for s in size[i])
    return (float(size[i, j]) / column + float(size[i, j]) / row) * math.sqrt(c.norm(j))


def random(c: Case) -> Tensor:
    return torch.rand(OUT, WIDTH, generator=torch.Generator().manual_seed(11)).double()


ORACLES: dict[str, Callable[[Case], Tensor]] = {
    "magnitude": each(lambda c, i, j: abs(float(c.weight[i, j]))),
    "random": random,
    "taylor": taylor,
    "obd": lambda c: c.weight**2 * c.curvature().clamp(min=0) / 2,
    "fisher": fisher,
    "obs": obs,
    "wanda": each(lambda c, i, j: abs(float(c.weight[i, j])) * c.norm(j)),
    "ria": each(ria),
}
OF_INPUTS = {"obs", "wanda", "ria"}  # read what the layer was fed: dead inputs score 0, groups have inputs of their own
INFORMED = sorted(set(ORACLES) - {"random"})


def test_every_criterion_stands_in_the_table():
    assert set(ORACLES) == set(CRITERIA)
    assert {name for name, c in CRITERIA.items() if c.needs & {"squares", "gram"}} == OF_INPUTS


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ORACLES)
def test_equals_the_loops(name: str, seed: int):
    case = make(seed)
    score = CRITERIA[name].score(case.w, case.stats)
    torch.testing.assert_close(score.double(), ORACLES[name](case), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ORACLES)
def test_finite_not_negative_and_of_the_weight_s_shape(name: str):
    case = make(1)
    before = case.w.clone()
    score = CRITERIA[name].score(before, case.stats)
    assert torch.equal(before, case.w)
    assert score.shape == case.w.shape
    assert score.dtype == torch.float32
    assert bool(torch.isfinite(score).all())
    assert bool((score >= 0).all())
    zero = CRITERIA[name].score(torch.zeros(OUT, WIDTH), case.stats)
    assert bool(torch.isfinite(zero).all())


@pytest.mark.parametrize("name", INFORMED)
def test_permuting_rows_permutes_scores_and_masks(name: str):
    case, order = make(2), torch.tensor([3, 0, 4, 1, 2])
    s = case.stats
    turned = replace(
        s,
        gradient=s.gradient[order],
        gradient_squares=s.gradient_squares[order],
        curvature_sum=s.curvature_sum[order],
    )
    score, permuted = CRITERIA[name].score(case.w, s), CRITERIA[name].score(case.w[order], turned)
    torch.testing.assert_close(permuted, score[order], rtol=1e-6, atol=0)
    per_row = Choose(parse("per-row"), 0.5)
    assert torch.equal(per_row(permuted), per_row(score)[order])
    nothing = int((score == 0).sum())  # among equal scores the first go, whatever row they are in
    if nothing < 18:
        layer = Choose(parse("layer"), 18 / 35)
        assert torch.equal(layer(permuted) | (permuted == 0), (layer(score) | (score == 0))[order])


@pytest.mark.parametrize("name", INFORMED)
def test_a_zero_weight_never_outranks_another(name: str):
    case = make(0)
    score = CRITERIA[name].score(case.w, case.stats)
    assert float(score[1, 3]) == 0


@pytest.mark.parametrize("name", sorted(OF_INPUTS))
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_weights_of_dead_inputs_score_nothing(name: str, scale: float):
    case = make(0)
    score = CRITERIA[name].score(case.w, replace(case.stats, inputs=seen(scale * case.x)))
    assert bool((score[:, DEAD] == 0).all())
    live = torch.ones(OUT, WIDTH, dtype=torch.bool)
    live[:, DEAD] = live[1, 3] = False
    assert bool((score[live] > 0).all())


@pytest.mark.parametrize("name", sorted(OF_INPUTS))
def test_groups_score_as_if_each_were_alone(name: str):
    x = torch.stack([correlated(TOKENS, WIDTH, seed=s) for s in (0, 10)])
    weight = noise(6, WIDTH, seed=3)
    score = CRITERIA[name].score(weight, Stats(seen(x), rows=6))
    for group, rows in enumerate((slice(0, 3), slice(3, 6))):
        alone = CRITERIA[name].score(weight[rows], Stats(seen(x[group]), rows=3))
        torch.testing.assert_close(score[rows], alone)


@pytest.mark.parametrize("name", CRITERIA)
def test_what_it_needs_is_all_that_it_reads(name: str):
    case, needs = make(0), CRITERIA[name].needs
    s = case.stats
    inputs = Inputs()
    if needs & {"squares", "gram"}:
        inputs = seen(case.x, gram="gram" in needs)
    given = Stats(
        inputs,
        s.gradient if "gradient" in needs else None,
        s.gradient_squares if "fisher" in needs else None,
        s.curvature_sum if "curvature" in needs else None,
        s.samples,
        s.seed,
        rows=OUT,
    )
    assert torch.equal(CRITERIA[name].score(case.w, given), CRITERIA[name].score(case.w, s))
    if needs:
        with pytest.raises(SecateurError):
            CRITERIA[name].score(case.w, Stats(rows=OUT))


def test_random_depends_on_the_seed_alone():
    case = make(0)
    one = CRITERIA["random"].score(case.w, case.stats)
    assert torch.equal(one, CRITERIA["random"].score(case.w * 2, Stats(seed=11)))
    assert not torch.equal(one, CRITERIA["random"].score(case.w, Stats(seed=12)))
    many = CRITERIA["random"].score(torch.zeros(200, 200), Stats(seed=0))
    assert abs(float(many.mean()) - 0.5) < 0.01
    assert 0 <= float(many.min()) < float(many.max()) < 1
