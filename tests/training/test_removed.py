"""Every mechanism that masks hold by, taken away: what it is for then goes wrong, so that the tests of it can fail."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from test_holding import RANKS, RECIPE, X, Y, backward, net, revived, sgd, step
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.training import Masks, Pruner, masks, pruner


def removed(monkeypatch, name: str) -> None:
    """A method of Pruner that does nothing from now on."""
    monkeypatch.setattr(Pruner, name, lambda *args, **kwargs: None)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, stepped=step, steps: int = 6) -> int:
    """Weights that came back, of a model whose masks were chosen before."""
    held = Pruner(model, RECIPE, optimizer, 10, end=0.0)
    for _ in range(steps):
        stepped(model, optimizer)
    return revived(model, held.masks)


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    for rows in (slice(0, 32), slice(32, 64)):
        backward(model, X[rows], Y[rows])
    optimizer.step()


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(X), Y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


HELD = {
    "momentum": (lambda m: sgd(m), step),
    "weight decay": (lambda m: torch.optim.Adam(m.parameters(), weight_decay=0.1), step),
    "accumulation": (lambda m: sgd(m), accumulated),
    "mixed precision": (lambda m: sgd(m), scaled),
    "foreach": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True), step),
    "fused": (lambda m: torch.optim.AdamW(m.parameters(), fused=True), step),
}


@pytest.mark.parametrize("row", HELD)
def test_without_the_product_after_each_step_weights_come_back(row, monkeypatch):
    make, stepped = HELD[row]
    model = net()
    assert trained(model, make(model), stepped) == 0
    model = net()
    optimizer = make(model)
    held = Pruner(model, RECIPE, optimizer, 10, end=0.0)
    removed(monkeypatch, "_hold")
    for _ in range(6):
        stepped(model, optimizer)
    assert revived(model, held.masks) > 500


def test_without_looking_for_skipped_steps_they_count(monkeypatch):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    held = Pruner(model, RECIPE, optimizer, 10)
    monkeypatch.setattr(pruner, "skipped", lambda optimizer: False)
    optimizer.found_inf = torch.tensor(1.0)
    step(model, optimizer)
    assert held.step == 1  # test_a_step_that_a_fused_optimizer_skips_does_not_count says 0


def test_without_plain_names_a_compiled_model_is_not_found(monkeypatch):
    compiled = torch.compile(net(), backend="eager")
    monkeypatch.setattr(masks, "WRAPPERS", ())
    with pytest.raises(Exception, match=r"0\.weight|none of the parameters"):
        Pruner(compiled, RECIPE, sgd(compiled), 10, end=0.0)


def test_without_being_told_of_it_a_moving_average_fills_up(monkeypatch):
    removed(monkeypatch, "also")
    model = net()
    optimizer = sgd(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    held = Pruner(model, RECIPE, optimizer, 30, every=3)
    held.also(average.module)
    for _ in range(30):
        step(model, optimizer)
        average.update_parameters(model)
    assert revived(average.module, held.masks) > 0


def test_without_watching_others_a_new_or_copied_optimizer_revives_everything(monkeypatch):
    for watched in (True, False):
        if not watched:
            removed(monkeypatch, "_watch_others")
        model = net()
        held = Pruner(model, RECIPE, sgd(model), 10, end=0.0)
        other = sgd(model)
        step(model, other)
        assert (revived(model, held.masks) > 500) == (not watched)


def test_without_the_saved_state_a_resumed_run_goes_another_way(tmp_path):
    def start(model: nn.Module, resume=None) -> tuple[torch.optim.Optimizer, Pruner]:
        optimizer = sgd(model)
        return optimizer, Pruner(model, RECIPE, optimizer, 20, method="rigl", every=2, resume=resume)

    model = net()
    optimizer, held = start(model)
    for _ in range(8):
        step(model, optimizer)
    held.save(tmp_path / "held")
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for _ in range(8):
        step(model, optimizer)
    for resume in (tmp_path / "held", None):
        again = net()
        again.load_state_dict(weights)
        other, resumed = start(again, resume)
        other.load_state_dict(state)
        for _ in range(8):
            step(again, other)
        same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert same == (resume is not None)
        assert (resumed.masks.digest() == held.masks.digest()) == (resume is not None)


def test_without_fresh_momentum_what_grows_moves_by_what_it_was(monkeypatch):
    moved = []
    for fresh in (True, False):
        if not fresh:
            monkeypatch.setattr(pruner, "fresh_", lambda *args: None)
        model = net()
        optimizer = sgd(model)
        held = Pruner(model, RECIPE, optimizer, 40, method="set", every=5)
        for _ in range(6):
            before = {name: keep.clone() for name, keep in held.masks.keep.items()}
            step(model, optimizer)
            if len(held.report().refreshes) > 1:
                break
        grown = held.masks.keep["0.weight"] & ~before["0.weight"]
        moved.append(float(optimizer.state[model[0].weight]["momentum_buffer"][grown].abs().sum()))
    assert moved[0] == 0 < moved[1]


def test_zeros_and_torchs_masks_that_are_not_taken_over_fill_up():
    for take in (Masks.of_zeros, Masks.of_torch_):
        for taken in (True, False):
            model = net()
            torch_prune.l1_unstructured(model[0], "weight", amount=0.5)
            if take is Masks.of_zeros or not taken:
                torch_prune.remove(model[0], "weight")
            gone = int((model[0].weight == 0).sum())
            optimizer = sgd(model)
            if taken:
                Pruner(model, RECIPE, optimizer, 10, method="static", masks=take(model), end=0.0)
            for _ in range(3):
                step(model, optimizer)
            left = int((model[0].weight == 0).sum())
            assert left == gone == 200 if taken else left < 10


def two_ranks(how: str, out, without: str = "") -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    ranks = [RANKS, how, out, *([without] if without else [])]
    return subprocess.run([*words, *ranks], env=env, capture_output=True, text=True, timeout=240)


def of_ranks(out) -> list[dict]:
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_ranks_that_differ_are_told(tmp_path):
    """What compares them, seen at work: nothing keeps these two together."""
    done = two_ranks("apart", tmp_path)
    assert done.returncode != 0
    assert "the ranks have chosen different masks" in done.stderr


def test_without_the_comparison_ranks_that_differ_go_on(tmp_path):
    done = two_ranks("apart", tmp_path, "comparison")
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = of_ranks(tmp_path)
    assert all(one[method]["digest"] != two[method]["digest"] for method in one)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_without_the_product_weights_come_back_on_both_ranks(how, tmp_path):
    done = two_ranks(how, tmp_path, "product")
    assert done.returncode == 0, done.stderr[-3000:]
    assert min(found["violations"] for rank in of_ranks(tmp_path) for found in rank.values()) > 500


def test_without_all_of_a_sharded_weight_ranks_choose_apart(tmp_path):
    done = two_ranks("fsdp", tmp_path, "whole")
    assert done.returncode != 0
    assert "the ranks have chosen different masks" in done.stderr


def test_without_its_place_a_mask_does_not_reach_a_sharded_weight(tmp_path):
    done = two_ranks("fsdp", tmp_path, "placed")
    assert done.returncode != 0
    assert "mixed torch.Tensor and DTensor" in done.stderr
