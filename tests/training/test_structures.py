"""Whole units that go while a model trains: held in every tensor, removed at the end without a difference."""

from __future__ import annotations

import copy
import math

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


def test_training_goes_on_after_the_cut():
    model = residual()
    structures = Structures(model, X[:2], remove={"channels": 0.5})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = Pruner(model, structures, optimizer, 20, every=2)
    fit(model, 20, optimizer)
    structures.finish_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fit(model, 5, optimizer)
    assert pruner.report().violations == 0
    assert pruner.report().step == 20
    again = Pruner(model, secateur.method("magnitude", sparsity=0.5, include=("head",)), optimizer, 5, method="static")
    fit(model, 5, optimizer)
    assert again.report().violations == 0


class Block(nn.Module):
    """Attention of four heads, and neurons, as in many small transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.norm = 4, nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.blocks, self.head = nn.Linear(3, 16), nn.ModuleList([Block(), Block()]), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [batch, 3, height, width], whose places are the tokens."""
        x = self.enter(x.flatten(2).mT)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def at_zero(block: Block) -> tuple[int, int]:
    """Heads and neurons of which nothing is left, in any of their tensors; none may be there in a part of them."""
    rows = torch.cat([block.qkv.weight, block.qkv.bias[:, None]], 1).view(3, 4, 4, 17)  # [qkv, heads, size, in]
    read = block.out.weight.view(16, 4, 4)  # [out, heads, size]
    heads = [*(part.flatten(1) for part in rows), read.transpose(0, 1).flatten(1)]
    neurons = [block.up.weight, block.up.bias[:, None], block.down.weight.T]
    found = []
    for parts in (heads, neurons):
        gone = torch.stack([(part == 0).all(1) for part in parts])
        assert torch.equal(gone.all(0), gone.any(0))
        found.append(int(gone.all(0).sum()))
    return found[0], found[1]


def test_heads_and_neurons_go_as_the_schedule_says_and_are_cut():
    torch.manual_seed(0)
    model = Transformer().double()
    structures = Structures(model, X[:2], remove={"heads": 0.5, "ffn": 0.25}, multiple=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    pruner = Pruner(model, structures, optimizer, 24, every=3, end=1.0)
    seen: list[tuple[int, int]] = []

    def look() -> None:
        assert pruner.report().violations == 0
        (found,) = {at_zero(block) for block in model.blocks}
        seen.append(found)

    fit(model, 24, optimizer, look)
    progress = [1 - (1 - number // 3 / 8) ** 3 for number in range(1, 25)]
    assert seen == [(math.floor(2 * t + 0.5), math.floor(6 * t + 0.5)) for t in progress]
    model.eval()
    masked = model(X).detach()
    assert structures.finish_().promise == "removed == masked"
    torch.testing.assert_close(model(X), masked, rtol=0, atol=1e-12)
    for block in model.blocks:
        assert block.heads == 2
        sizes = [tuple(m.weight.shape) for m in (block.qkv, block.out, block.up, block.down)]
        assert sizes == [(24, 16), (16, 8), (18, 16), (16, 18)]


@pytest.mark.parametrize("how", [{"method": "ac-dc"}, {"schedule": "cyclic"}])
def test_units_that_come_back_have_the_weights_that_they_had_and_learn(how, tmp_path):
    """All at zero they would have no gradient, and never be there again. A resumed run brings back the same ones."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = x[:, :3].argmax(1)

    def start(resume=None, state=None) -> tuple[nn.Sequential, torch.optim.Optimizer, Pruner]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        structures = Structures(model, x[:2], remove={"units": 0.5}, multiple=1)
        return model, optimizer, Pruner(model, structures, optimizer, 120, every=1, end=1.0, resume=resume, **how)

    def fit_on(model, optimizer, steps, seen=lambda: None) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            seen()

    model, optimizer, pruner = start()
    before = model[0].weight.detach().clone()
    lives, back = [], 0

    def look() -> None:
        nonlocal before, back
        now = model[0].weight.detach().clone()
        there, was = ((w != 0).any(1) for w in (now, before))
        lives.append(int(there.sum()))
        for unit in (there & ~was).nonzero().flatten().tolist():
            assert torch.equal(now[unit], last[unit])
            back += 1
        for unit in (there & was).nonzero().flatten().tolist():
            assert not torch.equal(now[unit], before[unit])  # it learns
        before = now

    last: dict[int, torch.Tensor] = {}
    held = pruner._exchange

    def exchange(gone, grown) -> None:
        for unit in gone["0.weight"].all(1).nonzero().flatten().tolist():
            last[unit] = model[0].weight[unit].detach().clone()
        held(gone, grown)

    pruner._exchange = exchange
    fit_on(model, optimizer, 70, look)
    pruner.save(tmp_path / "half.safetensors")
    half = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    fit_on(model, optimizer, 50, look)
    assert back > 8
    assert {8, 16} <= set(lives)
    assert lives[-1] == 8
    again, other, resumed = start(tmp_path / "half.safetensors", half)
    fit_on(again, other, 50)
    assert resumed.masks.digest() == pruner.masks.digest()
    for one, two in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_float32_model_is_cut_while_it_has_gradients():
    """As after the last step of any loop."""
    model = residual().float()
    structures = Structures(model, X[:2].float(), remove={"channels": 0.5})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    Pruner(model, structures, optimizer, 4, every=2)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X.float()), Y).backward()
        optimizer.step()
    model.eval()
    masked = model(X.float()).detach()
    structures.finish_()
    torch.testing.assert_close(model(X.float()), masked, rtol=0, atol=1e-4)
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.shape == parameter.shape


def test_states_of_other_structures_are_refused_and_those_that_are_cut():
    def pruner(share: float, model: nn.Module) -> Pruner:
        structures = Structures(model, X[:2], remove={"channels": share})
        return Pruner(model, structures, torch.optim.SGD(model.parameters(), lr=0.05), 4, schedule="cyclic", every=1)

    model = residual()
    state = pruner(0.5, model).state_dict()
    other = pruner(0.25, residual())
    with pytest.raises(SecateurError, match="another training's: remove was"):
        other.load_state_dict(state)
    assert other.step == 0
    same = pruner(0.5, residual())
    same.load_state_dict(state)
    structures = Structures(model, X[:2], remove={"channels": 0.5})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    Pruner(model, structures, optimizer, 2, every=1)
    fit(model, 2, optimizer)
    structures.finish_()
    with pytest.raises(SecateurError, match="are cut already"):
        Pruner(model, structures, torch.optim.SGD(model.parameters(), lr=0.05), 4)
