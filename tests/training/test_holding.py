"""Masks that hold, through everything that a training loop does to weights."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import secateur
from secateur.errors import SecateurError
from secateur.training import Masks, Pruner

X = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].argmax(1)
RECIPE = secateur.method("magnitude", sparsity=0.8, protect=("4",))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))


def sgd(model: nn.Module, **more) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, **more})


def backward(model: nn.Module, x: torch.Tensor = X, y: torch.Tensor = Y) -> None:
    nn.functional.cross_entropy(model(x), y).backward()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


def revived(model: nn.Module, masks: Masks) -> int:
    """Counted here, not by the code under test."""
    names = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()}
    return sum(int(((names[name] != 0) & ~keep).sum()) for name, keep in masks.keep.items())


def test_without_a_hook_momentum_revives_what_was_pruned():
    """What the hook is for: with it removed, pruned weights come back within a few steps."""
    model = net()
    optimizer = sgd(model)
    for _ in range(3):
        step(model, optimizer)
    pruner = Pruner(model, RECIPE, optimizer, 10, end=0.0)
    assert revived(model, pruner.masks) == 0
    step(model, optimizer)
    assert revived(model, pruner.masks) == 0
    optimizer._optimizer_step_post_hooks.clear()
    step(model, optimizer)
    gone = sum(int((~keep).sum()) for keep in pruner.masks.keep.values())
    assert revived(model, pruner.masks) > 0.9 * gone


def test_a_new_optimizer_is_hooked_when_it_steps():
    model = net()
    pruner = Pruner(model, RECIPE, sgd(model), 10, end=0.0)
    other = sgd(model, momentum=0.5)
    for _ in range(3):
        step(model, other)
        assert revived(model, pruner.masks) == 0
    assert pruner.step == 3


def test_an_optimizer_of_another_model_is_none_of_ours():
    model, other = net(), net()
    optimizer = sgd(model)
    pruner = Pruner(model, RECIPE, optimizer, 10, end=0.0)
    step(other, sgd(other))
    assert pruner.step == 0
    assert all(bool((p != 0).any()) for p in other.parameters())
    with pytest.raises(SecateurError, match="updates none of the parameters"):
        Pruner(model, RECIPE, sgd(other), 10)


def test_nothing_is_left_behind():
    import gc

    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    gc.collect()
    before = len(hooks)
    model = net()
    optimizer = sgd(model)
    pruner = Pruner(model, RECIPE, optimizer, 10)
    assert len(hooks) == before + 1
    del pruner, optimizer, model
    gc.collect()
    assert len(hooks) == before


def test_accumulated_gradients_count_one_step():
    model, whole = net(), net()
    one, other = sgd(model), sgd(whole)
    pruner, reference = Pruner(model, RECIPE, one, 8, every=1), Pruner(whole, RECIPE, other, 8, every=1)
    for _ in range(8):
        one.zero_grad()
        for part in range(4):
            rows = slice(16 * part, 16 * part + 16)
            (nn.functional.cross_entropy(model(X[rows]), Y[rows]) / 4).backward()
        one.step()
        step(whole, other)
    assert pruner.step == reference.step == 8
    assert pruner.masks.digest() == reference.masks.digest()
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_step_that_a_fused_optimizer_skips_does_not_count():
    """A scaler calls a fused optimizer all the same, and tells it by an attribute; any other it does not call at all."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    pruner = Pruner(model, RECIPE, optimizer, 10, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    counted = []
    for number in range(6):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(X), Y)).backward()
        if number in (2, 3):
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        counted.append(pruner.step)
        assert revived(model, pruner.masks) == 0
    assert counted == [1, 2, 2, 2, 3, 4]
    assert [refresh.step for refresh in pruner.report().refreshes] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_of_the_loss_and_not_of_the_scaled_one(fused):
    """Movement sums rate, weight and gradient: under a scale that grows it comes to the same bits as without one."""
    found = []
    for scale in (None, 64.0):
        model = net()
        optimizer = sgd(model, fused=fused)
        pruner = Pruner(model, RECIPE, optimizer, 30, method="movement", every=2, end=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, growth_interval=5, enabled=scale is not None)
        for _ in range(30):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(X), Y)).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append((pruner.state_dict()["memory"], pruner.masks.digest(), scaler.get_scale()))
    (plain, digest, _), (scaled, same, grown) = found
    assert grown == 64.0 * 2**6
    assert digest == same
    for layer in ("0", "2"):
        assert torch.equal(plain[f"{layer}/score"], scaled[f"{layer}/score"])


def test_compiled_models_keep_their_masks_and_plain_names():
    model = net()
    compiled = torch.compile(model, backend="eager")
    optimizer = sgd(compiled)
    pruner = Pruner(compiled, RECIPE, optimizer, 10, every=1, end=1.0)
    for _ in range(10):
        step(compiled, optimizer)
        assert revived(compiled, pruner.masks) == 0
    assert set(pruner.masks.keep) == {"0.weight", "2.weight"}
    assert sum(int((p == 0).sum()) for p in (model[0].weight, model[2].weight)) == 640


def test_a_moving_average_holds_them_too():
    model = net()
    optimizer = sgd(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    pruner = Pruner(model, RECIPE, optimizer, 30, every=3)
    pruner.also(average.module)
    for _ in range(30):
        step(model, optimizer)
        average.update_parameters(model)
        assert revived(average.module, pruner.masks) == 0
    assert pruner.report().violations == 0


@pytest.mark.parametrize("method", ["gradual", "rigl", "set", "movement"])
def test_resumed_is_not_interrupted_to_the_last_bit(method, tmp_path):
    def start(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return optimizer, Pruner(model, RECIPE, optimizer, 40, method=method, every=3)

    model = net()
    optimizer, pruner = start(model)
    for number in range(40):
        step(model, optimizer)
        if number == 16:
            parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
            torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    again = net()
    other, resumed = start(again)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["pruner"])
    for _ in range(23):
        step(again, other)
    assert resumed.report().refreshes == pruner.report().refreshes
    assert resumed.masks.digest() == pruner.masks.digest()
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_masks_of_another_model_are_refused():
    model = net()
    state = Pruner(model, RECIPE, sgd(model), 10).state_dict()
    other = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    pruner = Pruner(other, secateur.method("magnitude", sparsity=0.8), sgd(other), 10)
    with pytest.raises(SecateurError, match="another model's"):
        pruner.load_state_dict(state)


def test_masks_of_torch_are_taken_over_and_its_parametrizations_removed():
    model = net()
    for layer in (model[0], model[2]):
        torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    want = {"0.weight": model[0].weight_mask.bool().clone(), "2.weight": model[2].weight_mask.bool().clone()}
    masks = Masks.of_torch_(model)
    assert sorted(masks.keep) == sorted(want)
    assert all(torch.equal(masks.keep[name], mask) for name, mask in want.items())
    assert sorted(name for name, _ in model.named_parameters()) == sorted(name for name, _ in net().named_parameters())
    copy.deepcopy(model)
    with pytest.raises(SecateurError, match=r"no masks of torch\.nn\.utils\.prune"):
        Masks.of_torch_(model)


def test_zeros_of_a_checkpoint_are_masks_that_hold():
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(20, 20, generator=torch.Generator().manual_seed(2)) > 0.6)
    masks = Masks.of_zeros(model)
    assert list(masks.keep) == ["0.weight"]
    gone = int((model[0].weight == 0).sum())
    optimizer = sgd(model)
    pruner = Pruner(model, RECIPE, optimizer, 10, start=1.0, end=1.0, masks=masks)
    for _ in range(9):
        step(model, optimizer)
        assert int((model[0].weight == 0).sum()) == gone
    step(model, optimizer)
    assert pruner.report().sparsity == pytest.approx(0.8)


RANKS = Path(__file__).with_name("ranks.py")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_end_as_one_process_on_the_same_batch(how, tmp_path):
    """torchrun with gloo, in float64: identical masks and weights on both ranks, and those of one process."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    done = subprocess.run([*words, RANKS, how, tmp_path], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    subprocess.run([sys.executable, RANKS, "one", tmp_path], env=env, check=True, capture_output=True, timeout=240)
    alone = torch.load(tmp_path / "one.pt", weights_only=True)
    for method, want in alone.items():
        one, two = (rank[method] for rank in ranks)
        assert want["changed"] > 0
        assert one["digest"] == two["digest"] == want["digest"], method
        for name, weight in want["weights"].items():
            assert torch.equal(one["weights"][name], two["weights"][name])
            torch.testing.assert_close(one["weights"][name], weight, rtol=1e-9, atol=1e-12)
        assert [found["violations"] for found in (one, two, want)] == [0, 0, 0]
