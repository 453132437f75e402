"""Whole units that go while a model trains: held in every tensor, removed at the end without a difference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.training import Pruner, Structures

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = X.mean((2, 3)).argmax(1)


class Residual(nn.Module):
    """Two convolutions with a shortcut, batch norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.inner, self.between = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.outer = nn.Conv2d(24, 16, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.between(self.inner(x)).relu())
        return self.head(x.mean((2, 3)))


def residual() -> Residual:
    torch.manual_seed(0)
    return Residual().double()


def fit(model: nn.Module, steps: int, optimizer: torch.optim.Optimizer, seen=lambda: None) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        seen()


@pytest.mark.parametrize(
    ("request_", "method"),
    [
        ({"remove": {"channels": 0.5}}, "gradual"),
        ({"target": {"macs": 0.5}}, "gradual"),
        ({"remove": {"channels": 0.5}}, "ac-dc"),
    ],
)
def test_what_was_held_is_removed_without_a_difference(request_, method):
    model = residual()
    structures = Structures(model, X[:2], **request_, multiple=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    pruner = Pruner(model, structures, optimizer, 40, method=method, every=3)
    shares = []

    def seen() -> None:
        report = pruner.report()
        assert report.violations == 0
        shares.append(report.sparsity)

    fit(model, 40, optimizer, seen)
    assert shares[-1] > 0.4
    if method == "gradual":
        assert shares == sorted(shares)
    model.eval()
    masked, before = model(X).detach(), sum(p.numel() for p in model.parameters())
    plan = structures.finish_()
    assert plan.promise == "removed == masked"
    assert float((model(X).detach() - masked).abs().max()) < 1e-9
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    if "remove" in request_:
        assert (model.stem.weight.shape[0], model.inner.weight.shape[0]) == (8, 12)
    else:
        assert plan.after["macs"] <= 0.5 * plan.before["macs"]


def test_units_that_go_are_those_of_the_lowest_norm():
    model = residual()
    structures = Structures(model, X[:2], remove={"between.weight": 0.5}, multiple=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    weights = (model.inner.weight, model.outer.weight.transpose(0, 1), model.between.weight, model.between.bias)
    norms = sum(w.detach().reshape(24, -1).square().sum(1) for w in weights)
    Pruner(model, structures, optimizer, 10, schedule="one-shot")
    (units,) = structures.units.values()
    low = set(
        secateur.structure.importance(secateur.structure.trace(residual(), X[:2]))[next(iter(structures.units))]
        .argsort()[:12]
        .tolist()
    )
    assert set(units) == low
    assert len(set(units) & set(norms.argsort()[:12].tolist())) >= 9
    gone = torch.tensor(units)
    assert not bool(model.inner.weight[gone].any() | model.outer.weight[:, gone].any() | model.between.bias[gone].any())


def test_a_resumed_run_ends_with_the_same_model():
    def start(model: nn.Module) -> tuple[torch.optim.Optimizer, Structures, Pruner]:
        structures = Structures(model, X[:2], remove={"channels": 0.5}, multiple=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return optimizer, structures, Pruner(model, structures, optimizer, 24, every=3)

    model = residual()
    optimizer, structures, pruner = start(model)
    fit(model, 20, optimizer)  # after the last choice
    weights, state, held = (copy.deepcopy(part.state_dict()) for part in (model, optimizer, pruner))
    fit(model, 4, optimizer)
    again = residual()
    other, resumed, held_again = start(again)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    held_again.load_state_dict(held)
    fit(again, 4, other)
    assert resumed.units == structures.units
    structures.finish_()
    resumed.finish_()
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_cannot_be_masked_or_is_asked_wrongly_is_refused():
    torch.manual_seed(0)
    normed = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))
    width = [c.name for c in secateur.structure.trace(normed, torch.randn(2, 8)) if not c.exact]
    with pytest.raises(SecateurError, match="norm, mean or maximum runs over the units"):
        Structures(normed, torch.randn(2, 8), remove={width[0]: 0.5}, multiple=1)
    model = residual()
    with pytest.raises(SecateurError, match="nothing that can be removed"):
        Structures(model, X[:2], remove={"chanels": 0.5})
    structures = Structures(model, X[:2], remove={"channels": 0.5})
    with pytest.raises(SecateurError, match="the method rigl is for single weights"):
        Pruner(model, structures, torch.optim.SGD(model.parameters(), lr=0.1), 10, method="rigl")
    with pytest.raises(SecateurError, match="nothing is held at zero yet"):
        structures.finish_()
