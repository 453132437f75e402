"""ADMM: no worse than a refit of Wanda's mask, and the least-squares optimum of its own."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from problems import DAMP, correlated, error, gram, least_squares, noise, random_mask, stats
from secateur.weights.admm import admm_matrix
from secateur.weights.granularity import Choose, count, parse
from secateur.weights.update import UPDATES

CASES = [("layer", 0.5), ("layer", 0.8), ("per-row", 0.5), ("per-row", 0.7), ("2:4", 0.5), ("4:8", 0.5), ("1x4", 0.5)]


def system(x: Tensor, damp: float = DAMP) -> Tensor:
    """What ADMM minimizes: its damping is relative to each input's own square."""
    return gram(x) + torch.diag(damp * gram(x).diagonal())


def solve(weight: Tensor, x: Tensor, choose: Choose) -> tuple[Tensor, Tensor]:
    return UPDATES["admm"].solve(weight, stats(x, len(weight)), choose, "wanda")


@pytest.mark.parametrize(("granularity", "sparsity"), CASES)
@pytest.mark.parametrize("seed", [0, 10, 20])
def test_no_worse_than_the_refit_of_wanda_s_mask(granularity: str, sparsity: float, seed: int):
    weight, x = noise(16, 48, seed=seed), correlated(120, 48, seed=seed)
    choose = Choose(parse(granularity), sparsity)
    found, keep = solve(weight, x, choose)
    wanda = choose(weight.abs() * x.square().sum(0).sqrt())
    assert int(keep.sum()) == int(wanda.sum())
    for measure in (gram(x), system(x)):
        assert error(found, weight, measure) <= error(least_squares(weight, system(x), wanda), weight, measure)


@pytest.mark.parametrize(("granularity", "sparsity"), CASES)
@pytest.mark.parametrize("tokens", [20, 200])
def test_the_kept_weights_are_the_least_squares_of_the_mask(granularity: str, sparsity: float, tokens: int):
    weight, x = noise(8, 40, seed=1), correlated(tokens, 40, seed=2)
    found, keep = solve(weight, x, Choose(parse(granularity), sparsity))
    best = least_squares(weight, system(x), keep)
    assert bool((found[~keep] == 0).all())
    assert error(found, weight, system(x)) <= 1.02 * error(best, weight, system(x))


@pytest.mark.parametrize("granularity", ["layer", "per-row", "2:4", "row", "column", "4x4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.33, 0.9])
def test_the_count_is_exact(granularity: str, sparsity: float):
    weight, x = noise(8, 24, seed=1), correlated(60, 24, seed=2)
    found, keep = solve(weight, x, Choose(parse(granularity), sparsity))
    removed = {
        "layer": count(sparsity, 192),
        "per-row": 8 * count(sparsity, 24),
        "2:4": 96,
        "row": 24 * count(sparsity, 8),
        "column": 8 * count(sparsity, 24),
        "4x4": 16 * count(sparsity, 12),
    }[granularity]
    assert int((~keep).sum()) == removed
    if removed == 0:
        torch.testing.assert_close(found, weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_near_the_best_of_all_masks(seed: int):
    """3 of 7 weights: few enough to try them all."""
    weight, x = noise(6, 7, seed=seed), correlated(30, 7, seed=seed + 50)
    found, _ = solve(weight, x, Choose(parse("per-row"), 4 / 7))
    best = wanda = 0.0
    for row in weight:
        masks = torch.zeros(35, 7, dtype=torch.bool)
        for i, kept in enumerate(combinations(range(7), 3)):
            masks[i, list(kept)] = True
        rows = row.expand(35, 7)
        change = least_squares(rows, system(x), masks) - rows.double()
        best += float(((change @ system(x)) * change).sum(1).min())
        keep = Choose(parse("per-row"), 4 / 7)((row.abs() * x.square().sum(0).sqrt())[None])
        wanda += error(least_squares(row[None], system(x), keep), row[None], system(x))
    mine = error(found, weight, system(x))
    assert best <= mine * (1 + 1e-6)
    assert mine <= min(wanda * (1 + 1e-6), 1.5 * best)


def test_a_given_mask_is_only_refitted():
    weight, x, keep = noise(6, 30, seed=0), correlated(80, 30), random_mask((6, 30), 0.5)
    found, mask = admm_matrix(weight, stats(x, 6).inputs, 0, Choose(parse("layer"), 0.5).with_mask(keep), DAMP)
    assert torch.equal(mask, keep)
    torch.testing.assert_close(found.double(), least_squares(weight, system(x), keep), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**20])
def test_weights_of_dead_inputs_go_first_and_do_not_change(scale: float):
    weight, x = noise(8, 24, seed=3), scale * correlated(80, 24, seed=4, dead=[0, 5, 9])
    dead = torch.zeros(8, 24, dtype=torch.bool)
    dead[:, [0, 5, 9]] = True
    _, keep = solve(weight, x, Choose(parse("layer"), 0.5))
    assert not bool((keep & dead).any())
    found, keep = solve(weight, x, Choose(parse("layer"), 0.05))
    assert bool((keep | dead).all())
    assert torch.equal(found[dead & keep], weight[dead & keep])


@pytest.mark.parametrize("power", [-30, -12, 12, 30])
def test_the_scale_of_the_inputs_does_not_matter(power: int):
    weight, x = noise(8, 24, seed=3), correlated(80, 24, seed=4, dead=[5])
    found, keep = solve(weight, x, Choose(parse("layer"), 0.5))
    scaled, mask = solve(weight, x * 2.0**power, Choose(parse("layer"), 0.5))
    assert torch.equal(mask, keep)
    torch.testing.assert_close(scaled, found)
