"""Learned thresholds against their equation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur
from secateur.training import Pruner
from secateur.training.thresholds import LearnedThresholds

X = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].argmax(1)
RECIPE = secateur.method("magnitude", sparsity=0.5, protect=("4",))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))


def test_weights_and_gradients_by_hand():
    model = net()
    dense = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LearnedThresholds(model, RECIPE, optimizer, start=-2.0)
    threshold = 1 / (1 + torch.tensor(2.0).exp())
    want = torch.where(dense.abs() > threshold, dense - dense.sign() * threshold, torch.zeros(()))
    torch.testing.assert_close(model[0].weight, want)
    upstream = torch.randn(20, 20, generator=torch.Generator().manual_seed(2))
    (model[0].weight * upstream).sum().backward()
    s = model[0].parametrizations.weight[0].s
    slope = threshold * (1 - threshold)
    there = dense.abs() > threshold
    torch.testing.assert_close(s.grad, -(slope * dense.sign() * upstream)[there].sum())
    assert any(s is p for group in optimizer.param_groups for p in group["params"])


def test_thresholds_grow_and_the_model_is_plain_and_sparse_in_the_end():
    model = net()
    names = sorted(name for name, _ in model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.02)
    learned = LearnedThresholds(model, RECIPE, optimizer)
    before = learned.sparsity
    for _ in range(200):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
    sparsity, output = learned.sparsity, model(X).detach()
    assert sparsity > before + 0.2
    masks = learned.finish_()
    assert sorted(name for name, _ in model.named_parameters()) == names
    assert masks.sparsity == sparsity
    assert torch.equal(model(X), output)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, RECIPE, optimizer, 10, method="static", masks=masks)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
    assert pruner.masks.digest() == masks.digest()
    assert pruner.report().violations == 0


OPTIMIZERS = {
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.02),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_saved_training_goes_on_to_the_last_bit_and_its_zeros_hold(make, tmp_path):
    def start(like: float) -> tuple[nn.Module, torch.optim.Optimizer, LearnedThresholds]:
        model = net()
        optimizer = make(model)
        return model, optimizer, LearnedThresholds(model, RECIPE, optimizer, start=like)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()

    model, optimizer, learned = start(-3.0)
    fit(model, optimizer, 20)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "half.pt")
    fit(model, optimizer, 20)
    again, other, resumed = start(-5.0)
    weights, state = torch.load(tmp_path / "half.pt", weights_only=True)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    assert float(other.param_groups[-1]["params"][0].detach()) != -5.0
    fit(again, other, 20)
    masks = learned.finish_()
    assert resumed.finish_().digest() == masks.digest()
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    gone = {name: model.get_parameter(name) == 0 for name in ("0.weight", "2.weight")}
    assert all(torch.equal(masks.keep[name], ~zeros) and bool(zeros.any()) for name, zeros in gone.items())
    optimizer = make(model)
    Pruner(model, RECIPE, optimizer, 20, method="static", masks=masks)
    for _ in range(20):
        fit(model, optimizer, 1)
        assert all(not bool(model.get_parameter(name)[zeros].any()) for name, zeros in gone.items())
