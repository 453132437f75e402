"""Adapters under a mask: W + s (B A) * M, merged without a loss and without filling a zero."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.training.lora import hold_masks_

peft = pytest.importorskip("peft")
X = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))
Y = X[:, :4].argmax(1)


def pruned() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            cut = layer.weight.abs().flatten().kthvalue(layer.weight.numel() // 2).values
            layer.weight.mul_(layer.weight.abs() > cut)
    return model


def adapted(**more):
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], **more)
    return peft.get_peft_model(pruned(), config)


def train(model: nn.Module, steps: int = 60) -> float:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def zeros(model: nn.Module) -> list[torch.Tensor]:
    return [model[place].weight == 0 for place in (0, 2)]


def test_merging_is_exact_and_keeps_every_zero():
    model = adapted()
    before = float(nn.functional.cross_entropy(model(X), Y).detach())
    assert hold_masks_(model) == 2
    assert float(nn.functional.cross_entropy(model(X), Y).detach()) == before  # B is zero at first
    assert train(model) < 0.8 * before
    with torch.no_grad():
        want = model(X)
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(X), want, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(zeros(merged), zeros(pruned()), strict=True))
    assert type(merged[0]) is nn.Linear


def test_without_it_merging_fills_the_zeros():
    model = adapted()
    train(model, 5)
    merged = model.merge_and_unload()
    assert sum(int(found.sum()) for found in zeros(merged)) == 0


def test_the_layer_computes_its_equation():
    model = adapted(lora_bias=True)
    hold_masks_(model)
    train(model, 10)
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"]
    weight = layer.base_layer.weight
    delta = 2.0 * (b.weight @ a) * (weight != 0)
    want = X @ (weight + delta).T + layer.base_layer.bias + 2.0 * b.bias
    torch.testing.assert_close(layer(X), want)
    with model.disable_adapter():
        torch.testing.assert_close(layer(X), X @ weight.T + layer.base_layer.bias)


def test_saved_adapters_are_plain_ones(tmp_path):
    model = adapted()
    hold_masks_(model)
    train(model, 10)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(pruned(), tmp_path)
    hold_masks_(again)
    with torch.no_grad():
        torch.testing.assert_close(again(X), model(X))


def test_what_cannot_be_held_is_one_clear_error():
    with pytest.raises(SecateurError, match="no mask to hold"):
        hold_masks_(peft.get_peft_model(nn.Sequential(nn.Linear(20, 4)), peft.LoraConfig(target_modules=["0"])))
    with pytest.raises(SecateurError, match="plain LoRA on linear layers"):
        hold_masks_(adapted(use_dora=True))
