"""Every criterion with every granularity, update and allocation, through `prune_`: what is legal gives finite weights and
the exact sparsity, what is not gives the words of its rule, and nothing is left in between.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import TINY, batches
from problems import noise
from secateur import Recipe, Report, SecateurError, method, prune_
from secateur.recipe import RULES
from secateur.weights.allocation import ALLOCATIONS
from secateur.weights.criteria import CRITERIA
from secateur.weights.update import UPDATES

SPARSITY = 0.55  # no whole number anywhere
GRANULARITIES = ["layer", "per-row", "row", "column", "2:4", "1x4", "4x4"]
DATA = [noise(12, 8, seed=i) for i in range(2)]
IMAGES = [noise(2, 3, 5, 5, seed=i) for i in range(2)]


def perceptron() -> nn.Module:
    """Two layers, [12, 8] and [8, 12]."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
    return filled(model)


def convolutional() -> nn.Module:
    """A stem and a classifier, which are protected, and between them a plain and a grouped convolution."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 2),
        nn.Tanh(),
        nn.Conv2d(4, 8, 2),
        nn.Tanh(),
        nn.Conv2d(8, 12, 2, groups=2),
        nn.Flatten(),
        nn.Linear(48, 3),
    )
    return filled(model)


def filled(model: nn.Module) -> nn.Module:
    for i, parameter in enumerate(model.parameters()):
        parameter.data = noise(*parameter.shape, seed=i) / 2
    return model


def loss(model: nn.Module, batch: Any) -> Tensor:
    return model(*batch.values()).square().sum()


def groups(granularity: str, out: int, width: int) -> tuple[int, int, int]:
    """Groups, units in each, weights in a unit."""
    match granularity:
        case "layer":
            return 1, out * width, 1
        case "per-row":
            return out, width, 1
        case "row":
            return 1, out, width
        case "column":
            return 1, width, out
        case "2:4":
            return out * width // 4, 4, 1
    height, across = map(int, granularity.split("x"))
    return 1, out * width // (height * across), height * across


def exact(granularity: str, shape: tuple[int, int], sparsity: float) -> int:
    number, units, weights = groups(granularity, *shape)
    return number * math.floor((0.5 if ":" in granularity else sparsity) * units + 1e-9) * weights


def run(recipe: Recipe, model: nn.Module, data: list[Tensor]) -> Report:
    """Prune, and check what holds for every report."""
    report = prune_(model, recipe, data, loss=loss)
    assert len(report.layers) == 2
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        assert bool(torch.isfinite(weight).all())
        assert math.isfinite(layer.error)
        assert layer.removed == int((weight == 0).sum())
        assert layer.sparsity == layer.removed / weight.numel()
        assert layer.notes == []
    return report


def broken(values: dict[str, Any]) -> str | None:
    """The words for what may not be combined; this table is the test's own."""
    if ":" in values["granularity"] and values["allocation"] != "uniform":
        return "a threshold and an N:M pattern already say how much goes from each layer: use the allocation uniform"
    if values["criterion"] == "random" and values["allocation"] in ("global", "lamp"):
        return "scores of the criterion random do not compare layers: use the allocation uniform"
    return None


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_combination(criterion: str, update: str, allocation: str):
    for granularity in GRANULARITIES:
        values = {"criterion": criterion, "granularity": granularity, "update": update, "allocation": allocation}
        amount = {} if ":" in granularity else {"sparsity": SPARSITY}
        words = broken(values)
        if words is not None:
            assert words in {rule.why for rule in RULES}
            with pytest.raises(SecateurError) as caught:
                Recipe(**values, **amount, probes=1)
            assert str(caught.value) == f"recipe: {words}"
            continue
        report = run(Recipe(**values, **amount, probes=1), perceptron(), DATA)
        if allocation == "uniform":
            for layer in report.layers:
                assert layer.removed == exact(granularity, layer.shape, SPARSITY), granularity
        else:
            check_total(report, granularity, allocation)


def check_total(report: Report, granularity: str, allocation: str) -> None:
    """The target, up to the units of the granularity that a layer's share falls short of; exact where weights compete
    one by one and the allocation counts them.
    """
    total = sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    target = math.floor(SPARSITY * total + 1e-9)
    removed = sum(layer.removed for layer in report.layers)
    if granularity == "layer" and allocation in ("global", "lamp"):
        assert removed == target
    slack = sum(math.prod(groups(granularity, *layer.shape)[::2]) for layer in report.layers)
    assert target - slack <= removed <= target


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_convolutions(criterion: str, update: str):
    """Plain and grouped, whose groups see inputs of their own."""
    for granularity in ("layer", "per-row", "2:4"):
        amount = {} if ":" in granularity else {"sparsity": SPARSITY}
        recipe = Recipe(criterion=criterion, granularity=granularity, update=update, **amount, probes=1)
        report = run(recipe, convolutional(), IMAGES)
        assert [layer.shape for layer in report.layers] == [(8, 16), (12, 16)]
        for layer in report.layers:
            assert layer.removed == exact(granularity, layer.shape, SPARSITY)


@pytest.mark.parametrize("update", UPDATES)
def test_a_grouped_convolution_equals_its_groups_as_convolutions(update: str):
    """Two groups of one convolution, and two convolutions on the halves of its channels."""

    class Halves(nn.Module):
        def __init__(self, whole: nn.Module) -> None:
            super().__init__()
            self.stem, self.one, self.two = whole[0], nn.Conv2d(4, 6, 2), nn.Conv2d(4, 6, 2)
            for part, rows in ((self.one, slice(0, 6)), (self.two, slice(6, 12))):
                part.weight.data, part.bias.data = whole[1].weight[rows].data, whole[1].bias[rows].data

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return torch.cat([self.one(x[:, :4]), self.two(x[:, 4:])], 1)

    def whole() -> nn.Module:
        return filled(nn.Sequential(nn.Conv2d(3, 8, 2), nn.Conv2d(8, 12, 2, groups=2)))

    recipe = Recipe(criterion="ria", granularity="per-row", update=update, sparsity=0.5)
    grouped, halves = whole(), Halves(whole())
    prune_(grouped, recipe, IMAGES)
    prune_(halves, recipe, IMAGES)
    together = torch.cat([halves.one.weight, halves.two.weight])
    assert torch.equal(together == 0, grouped[1].weight == 0)
    torch.testing.assert_close(together, grouped[1].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "row", "4x4"])
@pytest.mark.parametrize("update", UPDATES)
def test_thresholds(update: str, granularity: str):
    for threshold in ({"absolute": 0.4}, {"sigma": 0.8}):
        model = perceptron()
        before = [model[i].weight.detach().clone() for i in (0, 2)]
        recipe = Recipe(criterion="magnitude", granularity=granularity, update=update, threshold=threshold)
        report = run(recipe, model, DATA)
        for layer, weight in zip(report.layers, before, strict=True):
            edge = threshold.get("absolute") or threshold["sigma"] * float(weight.std())
            size, (out, width) = weight.abs(), weight.shape
            if granularity == "row":
                size = size.mean(1, keepdim=True).expand(out, width)
            elif granularity == "4x4":
                tiles = size.reshape(out // 4, 4, width // 4, 4).mean((1, 3))
                size = tiles.repeat_interleave(4, 0).repeat_interleave(4, 1)
            assert torch.equal(model.get_submodule(layer.name).weight == 0, size < edge)


def test_overrides_keep_their_amounts_whatever_the_allocation():
    for allocation in ALLOCATIONS:
        recipe = Recipe(
            criterion="wanda",
            update="sparsegpt",
            allocation=allocation,
            sparsity=0.6,
            overrides=[
                {"match": "0", "granularity": "2:4"},
                {"match": "2", "sparsity": 0.25},
                {"match": "2", "update": "none"},
            ],
        )
        report = run(recipe, perceptron(), DATA)
        assert [layer.removed for layer in report.layers] == [48, 24]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_an_allocation_distributes_over_what_no_override_holds(allocation: str):
    overrides = [{"match": "2", "sparsity": 0.25}]
    recipe = Recipe(criterion="wanda", update="none", allocation=allocation, sparsity=0.5, overrides=overrides)
    report = run(recipe, perceptron(), DATA)
    assert [layer.removed for layer in report.layers] == [48, 24]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"match": "0", "threshold": {"absolute": 1}}, "override '0': recipe: a threshold compares |w|"),
        ({"match": "0", "criterion": "magnitude", "threshold": {}}, "override '0': recipe: a threshold has one of"),
        ({"match": "0", "granularity": "3:5"}, "multiple of 5 inputs"),
        ({"match": "1.*", "sparsity": 0.1}, "overrides: the pattern '1.*' matches no layer"),
    ],
)
def test_overrides_that_will_not_do(override: dict[str, Any], message: str):
    model = perceptron()
    with pytest.raises(SecateurError) as caught:
        prune_(model, Recipe(sparsity=0.5, overrides=[override]), DATA)
    assert message in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), perceptron().parameters(), strict=True))


@pytest.mark.parametrize("name", ["admm", "sparsegpt", "wanda-refit", "obd", "owl"])
def test_the_same_twice(name: str):
    one, two = perceptron(), perceptron()
    for model in (one, two):
        prune_(model, method(name, sparsity=SPARSITY), DATA, loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt", "admm", "obd", "global-magnitude"])
def test_a_language_model(name: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.3))
    report = prune_(model, method(name, sparsity=0.5, probes=1), batches(2))
    zeros = sum(int((model.get_submodule(layer.name).weight == 0).sum()) for layer in report.layers)
    assert report.sparsity == 0.5
    assert zeros == sum(layer.removed for layer in report.layers)
    assert set(report.protected) == {"model.embed_tokens", "lm_head"}


def test_the_cross_is_complete():
    """As many combinations as there are, of which the rules exclude those that the test's own table names."""
    every = list(product(CRITERIA, GRANULARITIES, UPDATES, ALLOCATIONS))
    keys = ("criterion", "granularity", "update", "allocation")
    excluded = [c for c in every if broken(dict(zip(keys, c, strict=True))) is not None]
    assert (len(every), len(excluded)) == (1120, 176)
