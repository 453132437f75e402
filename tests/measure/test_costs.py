"""Costs, against counts by hand."""

from __future__ import annotations

import torch
from torch import nn

from secateur.measure.costs import costs, latency


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
    )


def test_costs_are_those_that_one_counts():
    model = small()
    with torch.no_grad():
        model[0].weight[1] = 0  # a dead channel: 27 weights
        model[4].weight[:, :10] = 0  # 50 weights
    found = costs(model, torch.randn(2, 3, 8, 8))
    assert found.params == 108 + 8 + 325
    assert found.nnz == 81 + (8 - 4) + 275  # the norm's biases are zero
    assert found.macs == 16 * 108 + 320
    assert found.nnz_macs == 16 * 81 + 270
    assert (found.dead_channels, found.channels) == (1, 9)
    assert found.bytes == 4 * (108 + 8 + 325 + 8) + 8
    assert found.packed == (14 + 4 * 81) + (40 + 4 * 270) + 4 * (8 + 5 + 8) + 8


def test_macs_are_half_of_torchs_own_operations():
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3), nn.ConvTranspose2d(6, 4, 2, stride=2), nn.Conv2d(4, 5, 1), nn.Flatten(),
        nn.Linear(5 * 12 * 12, 7),
    )  # fmt: skip
    x = torch.randn(1, 3, 8, 8)
    with FlopCounterMode(display=False) as counted:
        model(x)
    assert 2 * costs(model, x).macs == counted.get_total_flops()


def test_latency_is_measured_at_every_batch():
    x = torch.randn(1, 3, 8, 8)
    seen: list[int] = []
    model = small()
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    found = latency({"one": model, "two": small()}, x, (1, 4), rounds=5)
    assert set(found["one"]) == {"p50_1", "p95_1", "p50_4", "p95_4"}
    assert all(0 < v["p50_1"] <= v["p95_1"] for v in found.values())
    assert seen == [1] * 8 + [4] * 8
