"""Methods against a brute force of their papers, and what holds for all of them."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

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
GRAINS = {"layer": SHARPEST, "per-row": SHARPEST, "2:4": 0.5, "2x4": 0.75, "row": 0.5, "column": 0.5}
TILES = {"2x4": (2, 4), "row": (1, 20), "column": (20, 1)}  # of weights that stand or fall together


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


def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Parameter -> weight and gradient of the last step, as they are before masks are chosen: ask for it before the pruner
    is made.
    """
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    optimizer.register_step_post_hook(
        lambda *_: found.update({n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()})
    )
    return found


def without_lowest(scores: torch.Tensor, gone: int) -> torch.Tensor:
    """What stays, by a sort of all."""
    keep = np.zeros(scores.numel(), bool)
    keep[np.argsort(scores.flatten().numpy(), kind="stable")[gone:]] = True
    return torch.from_numpy(keep).reshape(scores.shape)


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
    if granularity in TILES:
        height, width = TILES[granularity]
        for keep in pruner.masks.keep.values():
            tiles = keep.unfold(0, height, height).unfold(1, width, width).flatten(2)
            assert torch.equal(tiles.all(2), tiles.any(2))


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


CLOSED = {  # sparsity at t on the way to SHARPEST
    "linear": lambda t: SHARPEST * t,
    "iterative": lambda t: 1 - (1 - SHARPEST) ** t,
    "cyclic": lambda t: SHARPEST * (1 - (1 - 3 * t % 1) ** 3) if t < 1 else SHARPEST,
}


@pytest.mark.parametrize("schedule", CLOSED)
def test_sparsity_follows_the_schedule_from_its_start_to_its_end(schedule):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = Pruner(model, recipe(), optimizer, 40, schedule=schedule, every=4, start=0.1, end=0.85)
    choices, gone = [*range(4, 34, 4), 34], 0
    for number in range(1, 41):
        step(model, optimizer)
        if number in choices:
            gone = math.floor(400 * CLOSED[schedule](Fraction(number - 4, 30)) + 1e-9)
        for name in ("0.weight", "2.weight"):
            assert int((~pruner.masks.keep.get(name, torch.ones(1).bool())).sum()) == gone, number
            assert int((model.get_parameter(name) == 0).sum()) >= gone
    assert [refresh.step for refresh in pruner.report().refreshes] == choices
    assert gone == 320


OVERRIDES = {
    "sparsity": ({"sparsity": 0.4}, "uniform"),
    "pattern": ({"granularity": "2:4"}, "uniform"),
    "beside a global allocation": ({"sparsity": 0.4}, "global"),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_a_layer_with_an_override_has_a_sparsity_of_its_own(case):
    own, allocation = OVERRIDES[case]
    asked = secateur.method("magnitude", sparsity=SHARPEST, allocation=allocation, overrides=({"match": "2", **own},))
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    last = watch(model, optimizer)
    pruner = Pruner(model, asked, optimizer, 20, every=4, end=1.0)
    for _ in range(20):
        before = {name: keep.clone() for name, keep in pruner.masks.keep.items()}
        step(model, optimizer)
    size = {name: (last[name][0] * keep).abs() for name, keep in before.items()}
    want = without_lowest(size["2.weight"], 160)
    if "granularity" in own:
        want = (size["2.weight"].reshape(-1, 4).argsort(1).argsort(1) >= 2).reshape(20, 20)
    assert torch.equal(pruner.masks.keep["2.weight"], want)
    others = [name for name in size if name != "2.weight"]
    if allocation == "uniform":
        for name in others:
            assert torch.equal(
                pruner.masks.keep[name], without_lowest(size[name], round(SHARPEST * size[name].numel()))
            )
    else:
        best = without_lowest(torch.cat([size[name].flatten() for name in others]), 384)
        kept = torch.cat([pruner.masks.keep[name].flatten() for name in others])
        assert int((kept != best).sum()) <= 4  # of 480: the edge is found in a histogram


@pytest.mark.parametrize("method", ["static", "gradual"])
@pytest.mark.parametrize("criterion", ["taylor", "fisher"])
def test_criteria_of_gradients_read_those_of_the_last_step(criterion, method):
    """Both rank by (w g)^2; there is no gradient before the first step, and nothing is chosen without one."""
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    last = watch(model, optimizer)
    asked = secateur.method(criterion, sparsity=SHARPEST, protect=("4",))
    pruner = Pruner(model, asked, optimizer, 20, method=method, every=4, end=1.0)
    choices, want = [1, 5, 9, 13, 17, 20], {name: torch.ones(20, 20).bool() for name in ("0.weight", "2.weight")}
    for number in range(1, 21):
        optimizer.zero_grad()
        rows = slice(2 * number, 2 * number + 16)  # other gradients every time
        nn.functional.cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()
        if number in choices[: 1 if method == "static" else None]:
            share = SHARPEST * (1 if method == "static" else 1 - (1 - (number - 1) / 19) ** 3)
            for name, keep in want.items():
                weight, gradient = (t.double() for t in last[name])
                want[name] = without_lowest((weight * keep * gradient).square(), math.floor(400 * share + 1e-9))
        for name, keep in want.items():
            assert torch.equal(pruner.masks.keep[name], keep), number
    assert [refresh.step for refresh in pruner.report().refreshes] == choices
