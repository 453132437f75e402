"""Masks before training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur.training import Pruner
from secateur.training.at_init import synflow

X = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].argmax(1)


def net(depth: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(20, 20, bias=False), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(20, 4, bias=False))


def paths(model: nn.Sequential) -> float:
    """The sum over all paths of the products of absolute weights, as a product of matrices."""
    flow = torch.ones(20, dtype=torch.float64)
    for layer in model:
        if isinstance(layer, nn.Linear):
            flow = layer.weight.detach().double().abs() @ flow
    return float(flow.sum())


def test_one_round_of_synflow_by_hand():
    """R = 1' |W3| |W2| |W1| 1: the score of a weight is what flows in times what flows out."""
    model = net()
    recipe = secateur.method("magnitude", sparsity=0.5, allocation="global")
    masks = synflow(model, recipe, X, rounds=1)
    one, two, three = (model[place].weight.detach().double().abs() for place in (0, 2, 4))
    into, out = one.sum(1), three.sum(0)
    scores = torch.cat(
        [
            (one * (two.T @ out)[:, None]).flatten(),
            (two * out[:, None] * into[None, :]).flatten(),
            (three * (two @ into)[None, :]).flatten(),
        ]
    )
    kept = torch.cat([masks.keep[f"{place}.weight"].flatten() for place in (0, 2, 4)])
    assert int((~kept).sum()) == len(kept) // 2
    assert scores[~kept].max() <= scores[kept].min() * 1.001  # the threshold is of a histogram


def test_synflow_leaves_a_way_through_where_magnitude_does_not():
    model = net(depth=6)
    with torch.no_grad():
        model[4].weight.mul_(0.01)  # a layer of small weights
    state = {name: value.clone() for name, value in model.state_dict().items()}
    masks = synflow(model, secateur.method("magnitude", sparsity=0.97, allocation="global"), X)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert masks.sparsity == pytest.approx(0.97, abs=0.005)
    masks.apply_(model)
    assert paths(model) > 0


def test_given_masks_stay_through_training():
    model = net()
    masks = synflow(model, secateur.method("magnitude", sparsity=0.9, allocation="global"), X)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, secateur.method("magnitude", sparsity=0.9), optimizer, 20, method="static", masks=masks)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    assert pruner.masks.digest() == masks.digest()
    assert pruner.report().violations == 0


def test_snip_is_taylor_on_a_batch_before_the_first_step():
    model = net()
    loss = lambda m, batch: nn.functional.cross_entropy(m(X), Y)  # noqa: E731
    gradients = torch.autograd.grad(loss(model, None), [model[0].weight, model[2].weight, model[4].weight])
    scores = torch.cat([(model[2 * k].weight.detach() * g).abs().flatten() for k, g in enumerate(gradients)])
    recipe = secateur.method("taylor", sparsity=0.8, allocation="global")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, recipe, optimizer, 10, method="static", data=[{"input": X}], loss=loss)
    kept = torch.cat([pruner.masks.keep[f"{place}.weight"].flatten() for place in (0, 2, 4)])
    assert int((~kept).sum()) == int(0.8 * len(kept))
    assert scores[~kept].max() <= scores[kept].min() * 1.001


@pytest.mark.parametrize("criterion", ["wanda", "ria", "obs", "obd"])
@pytest.mark.parametrize("granularity", ["layer", "2:4"])
def test_criteria_of_calibration_data_choose_what_one_cut_of_the_model_chooses(criterion, granularity):
    """Each time of the model as it is then: its weights after the step, under the masks of the time before."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    stepped: dict[str, torch.Tensor] = {}
    optimizer.register_step_post_hook(lambda *_: stepped.update(copy.deepcopy(model.state_dict())))
    amount = {} if ":" in granularity else {"sparsity": 0.8}
    recipe = secateur.method(criterion, granularity=granularity, **amount)
    loss = lambda m, batch: nn.functional.cross_entropy(m(X), Y)  # noqa: E731
    pruner = Pruner(model, recipe, optimizer, 20, every=5, data=[{"input": X}], loss=loss)
    want: dict[str, torch.Tensor] = {}
    told = lambda layer, keep: want.update({layer.parameter: keep.clone()})  # noqa: E731
    for number in range(1, 21):
        before = pruner.masks
        optimizer.zero_grad()
        loss(model, None).backward()
        optimizer.step()
        if number == 15:  # the last choice
            once = net()
            once.load_state_dict({name: value * before.keep[name] for name, value in stepped.items()})
            secateur.prune_(once, recipe, [{"input": X}], loss=loss, chosen=told)
    assert sorted(want) == ["0.weight", "2.weight", "4.weight"]
    for name, keep in want.items():
        assert torch.equal(pruner.masks.keep[name], keep)
    report = pruner.report()
    assert report.refreshes[-1].step == 15
    assert report.violations == 0
    assert report.sparsity == pytest.approx(0.5 if ":" in granularity else 0.8)
