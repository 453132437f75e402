"""Rounds of iterative pruning, and what they rewind to."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.training import Masks, Pruner, iterate_

X = torch.randn(128, 20, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].argmax(1)
RECIPE = secateur.method("magnitude", sparsity=0.9, protect=("4",))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 4))


def fit(model: nn.Module, masks: Masks) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    Pruner(model, RECIPE, optimizer, 30, method="static", masks=masks) if masks.keep else None
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()


def test_each_round_keeps_four_fifths_of_what_is_left_and_the_last_reaches_the_target():
    model = mlp()
    start = copy.deepcopy(model.state_dict())
    fit(model, Masks({}))
    found = list(iterate_(model, RECIPE, fit, to=start))
    want = [1 - 0.8**k for k in range(1, 10)] + [0.9]
    assert [r.sparsity for r in found] == pytest.approx(want, abs=2e-3)
    for one, two in itertools.pairwise(found):
        assert all(not bool((two.masks.keep[n] & ~one.masks.keep[n]).any()) for n in one.masks.keep)
    assert found[-1].masks.violations(model) == 0


def test_weights_go_back_to_where_they_were_and_learning_rates_alone_leave_them():
    model = mlp()
    start = copy.deepcopy(model.state_dict())
    fit(model, Masks({}))
    seen: list[tuple[dict, Masks]] = []

    def look(model: nn.Module, masks: Masks) -> None:
        seen.append((copy.deepcopy(model.state_dict()), masks))
        fit(model, masks)

    trained = copy.deepcopy(model)
    next(iterate_(model, RECIPE, look, to=start))
    next(iterate_(trained, RECIPE, look, rewind="learning-rate"))
    (rewound, masks), (stayed, same) = seen
    assert masks.digest() == same.digest()  # chosen by the trained weights in both
    for name, value in start.items():
        keep = masks.keep.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(rewound[name], value * keep)
    assert not torch.equal(stayed["0.weight"], rewound["0.weight"])


def test_masks_are_those_of_the_smallest_trained_weights():
    model = mlp()
    fit(model, Masks({}))
    before = {n: p.detach().abs().clone() for n, p in model.named_parameters()}
    masks = next(iterate_(model, RECIPE, lambda m, k: None, rewind="learning-rate")).masks
    for name, keep in masks.keep.items():
        assert before[name][~keep].max() <= before[name][keep].min()


def test_thresholds_rise_round_by_round():
    model = mlp()
    recipe = secateur.method("magnitude", threshold={"sigma": 1.6}, protect=("4",))
    deviation = float(model[0].weight.detach().std())
    dense = model[0].weight.detach().abs().clone()
    rounds = iterate_(model, recipe, lambda m, k: None, rewind="learning-rate")
    first = next(rounds)
    assert torch.equal(~first.masks.keep["0.weight"], dense < 0.2 * deviation)
    found = [first, *rounds]
    assert len(found) == 8
    assert [r.sparsity for r in found] == sorted(r.sparsity for r in found)


@pytest.mark.parametrize(
    ("changes", "recipe", "says"),
    [
        ({"rewind": "wieghts"}, RECIPE, "did you mean 'weights'"),
        ({"keep": 1.0}, RECIPE, "between 0 and 1"),
        ({}, RECIPE, "what to: give the state dict"),
        ({"rewind": "learning-rate"}, secateur.method("wanda", sparsity=0.5), "by weights alone"),
        ({"rewind": "learning-rate"}, secateur.method("magnitude", granularity="2:4"), "until a sparsity"),
    ],
)
def test_rounds_that_make_no_sense_are_refused(changes, recipe, says):
    with pytest.raises(SecateurError, match=says):
        next(iterate_(mlp(), recipe, fit, **changes))
