"""Methods against a brute force of their papers, and what holds for all of them."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from secateur.training import METHODS, Pruner
from secateur.training.methods import REPLACED

SHARPEST = 0.8
X = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].argmax(1)
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}
GRAINS = {"layer": SHARPEST, "per-row": SHARPEST, "2:4": 0.5, "2x4": 0.75, "row": 0.5}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))


def recipe(granularity: str = "layer", **more) -> secateur.Recipe:
    amount = {} if ":" in granularity else {"sparsity": GRAINS[granularity]}
    return secateur.method("magnitude", granularity=granularity, protect=("4",), **amount, **more)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = nn.functional.cross_entropy(model(X), Y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("granularity", GRAINS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_masks_hold_at_every_step_and_the_target_is_met(method, optimizer, granularity):
    model = net()
    steps = OPTIMIZERS[optimizer](model.parameters())
    pruner = Pruner(model, recipe(granularity), steps, 40, method=method, every=3)
    losses = []
    for _ in range(40):
        losses.append(step(model, steps))
        assert pruner.masks.violations(model) == 0
    report = pruner.report()
    assert losses[-1] < losses[0]
    assert report.step == 40
    assert report.refreshes[-1].step == 30
    for name, sparsity in report.layers.items():
        assert sparsity == pytest.approx(GRAINS[granularity], abs=0.02), name
    if granularity == "2:4":
        for name in ("0", "2"):
            there = (model.get_submodule(name).weight.reshape(-1, 4) != 0).sum(1)
            assert bool((there <= 2).all())


def test_gradual_keeps_the_largest_at_every_refresh():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = Pruner(model, recipe(), optimizer, 40, every=5, end=1.0)
    for number in range(1, 41):
        keep = {name: pruner.masks.keep[f"{name}.weight"].clone() for name in ("0", "2")}
        loss = nn.functional.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        twin = net()
        twin.load_state_dict(model.state_dict())
        copied = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            one.grad = other.grad.clone()
        copied.step()
        before = {name: (twin.get_submodule(name).weight.detach() * keep[name]).abs() for name in ("0", "2")}
        optimizer.step()
        if number % 5:
            continue
        for name, size in before.items():
            gone = math.floor(SHARPEST * (1 - (1 - number / 40) ** 3) * size.numel() + 1e-9)
            want = np.zeros(size.numel(), bool)
            want[np.argsort(size.flatten().numpy(), kind="stable")[gone:]] = True
            assert np.array_equal(pruner.masks.keep[f"{name}.weight"].flatten().numpy(), want)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_drop_and_grow_by_brute_force(method):
    """The smallest of those that are there go; as many come, by gradient or at random, and with no momentum."""
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = Pruner(model, recipe(), optimizer, 1000, method=method, every=5, end=1.0)
    for _ in range(4):
        step(model, optimizer)
    before = {name: mask.clone() for name, mask in pruner.masks.keep.items()}
    loss = nn.functional.cross_entropy(model(X), Y)
    optimizer.zero_grad()
    loss.backward()
    moments = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]["momentum_buffer"]
        gradient = parameter.grad + 1e-2 * parameter.detach()
        moments[name] = (parameter.detach() - 0.1 * (0.9 * state + gradient), parameter.grad.clone())
    optimizer.step()
    share = REPLACED if method == "set" else REPLACED / 2 * (1 + math.cos(math.pi * 5 / 1000))
    for name, was in before.items():
        weight, gradient = (t.flatten().numpy() for t in moments[name])
        there = np.flatnonzero(was.flatten().numpy())
        dropped = set(there[np.argsort(np.abs(weight[there]), kind="stable")[: math.floor(share * len(there))]])
        now = set(np.flatnonzero(pruner.masks.keep[name].flatten().numpy()))
        assert len(now) == len(there)
        stays = set(there) - dropped
        assert stays <= now
        if method == "rigl":
            others = np.array(sorted(set(range(len(weight))) - stays))
            best = others[np.argsort(-np.abs(gradient[others]), kind="stable")[: len(dropped)]]
            assert now - stays == set(best)
        else:
            assert not (now & dropped)
        grown = np.array(sorted(now - set(there)))
        parameter = model.get_parameter(name)
        momentum = optimizer.state[parameter]["momentum_buffer"].flatten()
        assert len(grown)
        assert bool((momentum[grown] == 0).all())
        assert bool((parameter.flatten()[grown] == 0).all())


def test_grown_weights_have_the_second_moment_of_their_layer():
    model = net()
    optimizer = OPTIMIZERS["foreach"](model.parameters())
    pruner = Pruner(model, recipe(), optimizer, 100, method="set", every=5, end=1.0)
    for _ in range(4):
        step(model, optimizer)
    before = pruner.masks.keep["0.weight"].clone()
    step(model, optimizer)
    grown = pruner.masks.keep["0.weight"] & ~before
    state = optimizer.state[model[0].weight]
    assert int(grown.sum()) > 0
    assert bool((state["exp_avg"][grown] == 0).all())
    assert len(state["exp_avg_sq"][grown].unique()) == 1
    assert float(state["exp_avg_sq"][grown][0]) > 0


def test_movement_is_what_the_weight_and_its_gradient_say():
    """S = - sum of rate w dL/dw', with the weight that a masked one had; and what comes back has that weight. The rate is
    that of the weight's group.
    """
    model = net()
    rest = [p for name, p in model.named_parameters() if name not in ("0.weight", "2.weight")]
    optimizer = torch.optim.SGD([{"params": rest, "lr": 0.0}, {"params": [model[0].weight, model[2].weight]}], lr=0.1)
    pruner = Pruner(model, recipe(), optimizer, 60, method="movement", every=5, end=1.0)
    score = {name: torch.zeros_like(model.get_parameter(name)) for name in ("0.weight", "2.weight")}
    dense = {name: model.get_parameter(name).detach().clone() for name in score}
    returned = 0
    for number in range(1, 61):
        keep = {name: pruner.masks.keep[name].clone() for name in score}
        loss = nn.functional.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        loss.backward()
        for name in score:
            parameter = model.get_parameter(name)
            score[name] -= 0.1 * dense[name] * parameter.grad
            stepped = parameter.detach() - 0.1 * parameter.grad
            dense[name] = torch.where(keep[name], stepped, dense[name])
        optimizer.step()
        if number % 5 == 0:
            for name, values in score.items():
                gone = math.floor(SHARPEST * (1 - (1 - number / 60) ** 3) * values.numel() + 1e-9)
                kept = pruner.masks.keep[name]
                assert int((~kept).sum()) == gone
                if gone:
                    assert values[~kept].max() <= values[kept].min() + 1e-7
                back = kept & ~keep[name]
                returned += int(back.sum())
                torch.testing.assert_close(model.get_parameter(name)[back], dense[name][back])
    assert returned


def test_ac_dc_is_dense_and_sparse_in_turns():
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = Pruner(model, recipe(), optimizer, 100, method="ac-dc", every=1, end=1.0)
    seen = []
    for _ in range(100):
        step(model, optimizer)
        seen.append(round(pruner.report().sparsity, 1))
    assert [seen[place] for place in (4, 14, 24, 34, 44, 54, 99)] == [0.0, 0.8, 0.0, 0.8, 0.0, 0.8, 0.8]
