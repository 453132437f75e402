"""What all updates promise, whatever the criterion; and grouped convolutions, each of whose groups stands alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from problems import DAMP, correlated, error, gram, noise, random_mask, seen, stats
from secateur.errors import SecateurError
from secateur.weights.criteria import CRITERIA
from secateur.weights.granularity import Choose, parse
from secateur.weights.stats import Stats
from secateur.weights.sweep import sweep_matrix
from secateur.weights.update import UPDATES

OUT, WIDTH = 8, 24
GRANULARITIES = ["layer", "per-row", "row", "column", "2:4", "1x4", "4x4"]
BY_INPUTS = ["magnitude", "random", "obs", "wanda", "ria"]


def layer(seed: int = 0) -> tuple[torch.Tensor, Stats]:
    return noise(OUT, WIDTH, seed=seed), stats(correlated(60, WIDTH, seed=seed, dead=[5]), OUT)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("criterion", BY_INPUTS)
def test_what_goes_is_zero_and_as_much_as_asked(criterion: str, granularity: str, update: str):
    weight, given = layer()
    choose = Choose(parse(granularity), 0.5)
    before = weight.clone()
    new, keep = UPDATES[update].solve(weight, given, choose, criterion)
    assert torch.equal(weight, before)
    assert new.shape == keep.shape == weight.shape
    assert bool(torch.isfinite(new).all())
    assert bool((new[~keep] == 0).all())
    chosen = choose(CRITERIA[criterion].score(weight, given))
    assert int(keep.sum()) == int(chosen.sum()) == OUT * WIDTH // 2
    if criterion != UPDATES[update].chooses_by:
        assert torch.equal(keep, chosen)
    if update == "none":
        assert torch.equal(new, weight * keep)


@pytest.mark.parametrize(("update", "criterion"), [(name, u.chooses_by) for name, u in UPDATES.items() if u.chooses_by])
def test_a_choice_made_on_the_way_is_better_than_one_made_beforehand(update: str, criterion: str):
    x = correlated(200, 64, seed=3)
    weight, given = noise(32, 64, seed=4), stats(x, 32)
    choose = Choose(parse("2:4"))
    mine, keep = UPDATES[update].solve(weight, given, choose, criterion)
    before = choose(CRITERIA[criterion].score(weight, given))
    assert not torch.equal(keep, before)
    theirs, _ = UPDATES[update].solve(weight, given, choose.with_mask(before), "magnitude")
    assert error(mine, weight, gram(x)) < error(theirs, weight, gram(x))


@pytest.mark.parametrize("criterion", ["obs", "wanda"])
def test_better_updates_leave_smaller_errors(criterion: str):
    """On one mask: nothing, the sweep, least squares."""
    x = correlated(200, 64, seed=5)
    weight, given = noise(32, 64, seed=6), stats(x, 32)
    keep = Choose(parse("layer"), 0.5)(CRITERIA[criterion].score(weight, given))
    choose = Choose(parse("layer"), 0.5).with_mask(keep)
    errors = [
        error(UPDATES[name].solve(weight, given, choose, criterion)[0], weight, gram(x))
        for name in ("refit", "sparsegpt", "none")
    ]
    assert errors == sorted(errors)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_groups_equal_each_group_alone(update: str, groups: int, masked: bool):
    """With a mask of their own or chosen by row; where the choice is part of the update, it is made beforehand."""
    x = torch.stack([correlated(50, 12, seed=10 * g, dead=[g]) for g in range(groups)])
    weight, keep = noise(4 * groups, 12, seed=1), random_mask((4 * groups, 12), 0.5)
    criterion = "ria" if not masked else "wanda"
    choose = Choose(parse("per-row"), 0.5)
    whole = replace(choose, fixed=keep if masked else None)
    found, mask = UPDATES[update].solve(weight, Stats(seen(x), damp=DAMP, rows=4 * groups), whole, criterion)
    for g in range(groups):
        rows = slice(4 * g, 4 * g + 4)
        part = replace(choose, fixed=keep[rows] if masked else None)
        alone, own = UPDATES[update].solve(weight[rows], stats(x[g], 4), part, criterion)
        assert torch.equal(mask[rows], own)
        torch.testing.assert_close(found[rows], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("update", "criterion"), [("sparsegpt", "obs"), ("admm", "wanda")])
def test_groups_take_masks_of_the_dense_weights(update: str, criterion: str):
    x = torch.stack([correlated(50, 12, seed=10 * g) for g in range(2)])
    weight, given = noise(8, 12, seed=1), Stats(seen(x), damp=DAMP, rows=8)
    choose = Choose(parse("layer"), 0.5)
    _, keep = UPDATES[update].solve(weight, given, choose, criterion)
    assert torch.equal(keep, choose(CRITERIA[criterion].score(weight, given)))


def test_sparsegpt_by_obs_is_the_sweep():
    weight, given = noise(6, 40, seed=0), stats(correlated(80, 40), 6)
    choose = Choose(parse("2:4"))
    found, keep = UPDATES["sparsegpt"].solve(weight, given, choose, "obs")
    expected, mask = sweep_matrix(weight, given.inputs.factor(DAMP)[0], choose)
    assert torch.equal(keep, mask)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**20])
@pytest.mark.parametrize(("update", "criterion"), [("none", "obs"), ("sparsegpt", "obs"), ("refit", "obs")])
def test_weights_of_dead_inputs_go_first_and_do_not_change(update: str, criterion: str, scale: float):
    """Whatever the scale of the other inputs."""
    weight, dead = noise(8, 24, seed=3), torch.zeros(8, 24, dtype=torch.bool)
    dead[:, [0, 5, 9]] = True
    given = stats(scale * correlated(80, 24, seed=4, dead=[0, 5, 9]), 8)
    _, keep = UPDATES[update].solve(weight, given, Choose(parse("layer"), 0.5), criterion)
    assert not bool((keep & dead).any())
    found, keep = UPDATES[update].solve(weight, given, Choose(parse("layer"), 0.05), criterion)
    assert bool((keep | dead).all())
    torch.testing.assert_close(found[dead & keep], weight[dead & keep])


@pytest.mark.parametrize("update", UPDATES)
def test_transposed_weights_give_the_same(update: str):
    weight, given = layer(2)
    choose = Choose(parse("layer"), 0.5)
    found, keep = UPDATES[update].solve(weight, given, choose, "wanda")
    turned, mask = UPDATES[update].solve(weight.t().contiguous().t(), given, choose, "wanda")
    assert torch.equal(mask, keep)
    torch.testing.assert_close(turned, found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UPDATES)
def test_needs_name_what_is_read(name: str):
    weight, update, choose = noise(OUT, WIDTH, seed=0), UPDATES[name], Choose(parse("layer"), 0.5)
    if "gram" in update.needs:
        given = Stats(seen(correlated(60, WIDTH), gram=False), damp=DAMP, rows=OUT)
        with pytest.raises((SecateurError, AssertionError)):
            update.solve(weight, given, choose, "magnitude")
    else:
        update.solve(weight, Stats(), choose, "magnitude")
