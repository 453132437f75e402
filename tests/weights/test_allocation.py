"""Allocations against brute force over all scores at once; budgets and bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from problems import noise
from secateur.errors import SecateurError
from secateur.weights.allocation import (
    ALLOCATIONS,
    FLOOR,
    NEEDS_SCORES,
    SWING,
    Summary,
    allocate,
    histogram,
    lamp_scores,
    summarize,
)
from secateur.weights.granularity import count

RESOLUTION = 2.0**-11  # of a histogram, with the rounding of its own edges

shapes = st.lists(st.tuples(st.integers(2, 12), st.integers(2, 12)), min_size=1, max_size=6)
targets = st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.7, 0.9, 0.95])


def table(sizes: list[tuple[int, int]], seed: int = 0) -> dict[str, Tensor]:
    """Scores per layer, on scales that differ between layers."""
    return {
        f"l{i}": noise(*shape, seed=seed + i).abs() * 10.0 ** (float(noise(1, seed=seed - i - 1)) / 2)
        for i, shape in enumerate(sizes)
    }


def summaries(scores: dict[str, Tensor], allocation: str) -> list[Summary]:
    return [summarize(name, s.shape, f"block {name}", s, allocation) for name, s in scores.items()]


def total(scores: dict[str, Tensor]) -> int:
    return sum(s.numel() for s in scores.values())


def sorted_together(scores: dict[str, Tensor], sparsity: float) -> tuple[dict[str, int], float]:
    """Per layer how many of the lowest scores of all it holds, where each keeps FLOOR of its weights; and the last that
    goes.
    """
    room = {name: int(s.numel() * (1 - FLOOR)) for name, s in scores.items()}
    gone, left, edge = dict.fromkeys(scores, 0), math.floor(sparsity * total(scores) + 1e-9), 0.0
    for value, name in sorted((float(v), name) for name, s in scores.items() for v in s.flatten()):
        if left and gone[name] < room[name]:
            gone[name] += 1
            left -= 1
            edge = value
    return gone, edge


def lamp_by_definition(scores: Tensor) -> Tensor:
    """For each weight its square over the sum of the squares of all that come at or after it in ascending order."""
    flat = [float(s) for s in scores.flatten()]
    order = sorted(range(len(flat)), key=lambda i: (flat[i], i))
    result = [0.0] * len(flat)
    for place, i in enumerate(order):
        rest = sum(flat[k] ** 2 for k in order[place:])
        result[i] = flat[i] ** 2 / rest if rest else 0.0
    return torch.tensor(result).reshape(scores.shape)


def near(scores: Tensor, edge: float) -> int:
    """Scores that a histogram cannot tell from the last that goes."""
    return int(((scores - edge).abs() <= RESOLUTION * edge).sum())


@given(shapes, targets, st.integers(0, 50))
def test_global_removes_the_lowest_scores_of_all_layers_together(sizes, sparsity: float, seed: int):
    scores = table(sizes, seed)
    found = allocate("global", summaries(scores, "global"), sparsity)
    removed = {name: count(found[name], s.numel()) for name, s in scores.items()}
    expected, edge = sorted_together(scores, sparsity)
    assert sum(removed.values()) == sum(expected.values())
    for name, s in scores.items():
        assert abs(removed[name] - expected[name]) <= near(s, edge)


@given(shapes, targets, st.integers(0, 50))
def test_lamp_is_global_on_relative_scores(sizes, sparsity: float, seed: int):
    scores = table(sizes, seed)
    found = allocate("lamp", summaries(scores, "lamp"), sparsity)
    relative = {name: lamp_by_definition(s) for name, s in scores.items()}
    expected, edge = sorted_together(relative, sparsity)
    removed = {name: count(found[name], s.numel()) for name, s in scores.items()}
    assert sum(removed.values()) == sum(expected.values())
    for name, s in relative.items():
        assert abs(removed[name] - expected[name]) <= near(s, edge)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 50), st.booleans())
def test_lamp_scores_by_definition(out: int, width: int, seed: int, ties: bool):
    scores = noise(out, width, seed=seed).abs()
    scores = (scores * 2).round() if ties else scores
    found, expected = lamp_scores(scores), lamp_by_definition(scores)
    if ties:  # among equals the order is free
        found, expected = found.flatten().sort().values, expected.flatten().sort().values
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_lamp_does_not_know_a_layer_s_scale():
    scores = noise(4, 5, seed=0).abs()
    torch.testing.assert_close(lamp_scores(scores * 1000), lamp_scores(scores))


@given(st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=60))
def test_a_histogram_counts_every_score_in_a_narrow_bin(values: list[float]):
    scores = torch.tensor(values)
    edges, counts = histogram(scores)
    assert int(counts.sum()) == len(values)
    assert bool((edges[1:] > edges[:-1]).all())
    upper = torch.cat([edges[1:], torch.tensor([torch.inf])])
    for edge, end, number in zip(edges, upper, counts, strict=True):
        inside = scores[(scores >= edge) & (scores < end)]
        assert len(inside) == number
        assert bool((inside - edge <= 2.0**-11 * inside.clamp(min=1e-37)).all())


def erdos_renyi_by_hand(layers: list[Summary], sparsity: float) -> dict[str, float]:
    """The scale by bisection, where densities are clipped at 1."""
    size = {layer.name: math.prod(layer.shape) for layer in layers}
    raw = {layer.name: sum(layer.shape) / size[layer.name] for layer in layers}
    budget = (1 - sparsity) * sum(size.values())
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        spent = sum(min(1.0, middle * raw[name]) * size[name] for name in raw)
        low, high = (middle, high) if spent < budget else (low, middle)
    return {name: 1 - min(1.0, low * raw[name]) for name in raw}


@given(
    st.lists(
        st.one_of(st.tuples(*[st.integers(1, 300)] * 2), st.tuples(*[st.integers(1, 20)] * 4)), min_size=1, max_size=6
    ),
    st.floats(0, 0.99),
)
def test_erdos_renyi_spends_its_budget(sizes, sparsity: float):
    layers = [Summary(f"l{i}", tuple(shape)) for i, shape in enumerate(sizes)]
    found = allocate("erdos-renyi", layers, sparsity)
    size = sum(layer.size for layer in layers)
    assert all(0 <= s < 1 for s in found.values())
    assert sum(found[layer.name] * layer.size for layer in layers) == pytest.approx(sparsity * size, abs=1e-6 * size)
    expected = erdos_renyi_by_hand(layers, sparsity)
    assert found == pytest.approx(expected, abs=1e-5)


def with_outliers(name: str, shape: tuple[int, int], block: str, share: float) -> Summary:
    """A layer where this share of the scores (below 1 / OUTLIER) are a million times the others."""
    size = shape[0] * shape[1]
    return Summary(name, shape, block, torch.tensor([1.0, 1e6]), torch.tensor([1 - share, share]).double() * size)


@given(st.lists(st.floats(0, 0.19), min_size=1, max_size=8), st.floats(0, 0.999), st.data())
def test_owl_stays_near_the_target_and_meets_it_on_average(share: list[float], sparsity: float, data: st.DataObject):
    sizes = data.draw(st.lists(st.integers(1, 50), min_size=len(share), max_size=len(share)))
    layers = [with_outliers(f"l{i}", (n, 3), f"b{i}", o) for i, (n, o) in enumerate(zip(sizes, share, strict=True))]
    found = allocate("owl", layers, sparsity)
    mean = sum(found[layer.name] * layer.size for layer in layers) / sum(layer.size for layer in layers)
    assert mean == pytest.approx(sparsity, abs=1e-9)
    assert all(abs(s - sparsity) <= SWING + 1e-9 for s in found.values())
    assert all(0 <= s <= max(1 - FLOOR, sparsity) + 1e-9 for s in found.values())
    kept = [1 - found[layer.name] for _, layer in sorted(zip(share, layers, strict=True), key=lambda pair: pair[0])]
    assert kept == pytest.approx(sorted(kept), abs=1e-6), "more outliers keep more"


def test_owl_as_published_where_no_block_stands_out():
    """Evenly spread shares, worked out by hand: 0.7 - 0.08 to 0.7 + 0.08."""
    layers = [with_outliers(f"l{i}", (4, 4), f"b{i}", o) for i, o in enumerate([0.01, 0.02, 0.03])]
    found = allocate("owl", layers, 0.7)
    assert list(found.values()) == pytest.approx([0.78, 0.7, 0.62])


def test_owl_treats_the_layers_of_a_block_alike():
    """The share of outliers of a block is over its weights, not over its layers."""
    layers = [
        with_outliers("a.q", (10, 10), "a", 0.1),
        with_outliers("a.up", (30, 10), "a", 0.0),
        with_outliers("b.q", (20, 20), "b", 0.025),
        with_outliers("c.q", (20, 20), "c", 0.0),
    ]
    found = allocate("owl", layers, 0.5)
    assert found["a.q"] == found["a.up"] == pytest.approx(found["b.q"])
    assert found["c.q"] > found["b.q"]


def test_outliers_are_counted_against_the_block_s_mean():
    """As in the authors' code, which joins the scores of a block: a layer of large scores is one of outliers."""
    small, large = torch.full((30, 10), 0.5), torch.full((1, 10), 64.0)
    even = torch.full((31, 10), 3.0)
    layers = [
        summarize("a.small", (30, 10), "a", small, "owl"),
        summarize("a.large", (1, 10), "a", large, "owl"),
        summarize("b.even", (31, 10), "b", even, "owl"),
    ]
    found = allocate("owl", layers, 0.5)
    assert list(found.values()) == pytest.approx([0.42, 0.42, 0.58])


def test_uniform():
    layers = [Summary(f"l{i}", (3, 4)) for i in range(3)]
    assert allocate("uniform", layers, 0.37) == dict.fromkeys(("l0", "l1", "l2"), 0.37)


@pytest.mark.parametrize("name", ["global", "lamp"])
def test_no_layer_is_emptied(name: str):
    """One layer's scores are all below those of the other."""
    scores = {"low": noise(50, 10, seed=0).abs() * 1e-6, "high": noise(50, 10, seed=1).abs() + 1}
    if name == "lamp":
        scores["low"] = scores["low"][:1].expand(50, 10).clone() * torch.linspace(1, 1.001, 50)[:, None]
    for sparsity in (0.5, 0.9, 1 - FLOOR):
        found = allocate(name, summaries(scores, name), sparsity)
        assert all(s <= 1 - FLOOR for s in found.values())
        assert sum(count(found[n], 500) for n in scores) == math.floor(sparsity * 1000 + 1e-9)
    with pytest.raises(SecateurError, match=r"every layer keeps 2%, so at most 0\.98"):
        allocate(name, summaries(scores, name), 0.985)


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_a_single_layer_gets_the_target(name: str):
    scores = table([(20, 10)])
    for sparsity in (0.0, 0.25, 0.5, 0.8):
        found = allocate(name, summaries(scores, name), sparsity)
        assert found == pytest.approx({"l0": sparsity})


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_nothing_to_allocate(name: str):
    assert allocate(name, [], 0.5) == {}


@pytest.mark.parametrize("name", sorted(set(ALLOCATIONS) - {"global", "lamp"}))
def test_the_order_of_layers_does_not_matter(name: str):
    layers = summaries(table([(20, 10), (5, 5), (30, 4)]), name)
    assert allocate(name, layers, 0.6) == pytest.approx(allocate(name, layers[::-1], 0.6))


def test_only_allocations_by_score_read_scores():
    for name in set(ALLOCATIONS) - NEEDS_SCORES:
        allocate(name, [Summary("a", (4, 4)), Summary("b", (8, 2))], 0.5)


def test_equal_scores_everywhere_still_give_the_exact_count():
    scores = {"a": torch.ones(10, 10), "b": torch.ones(20, 10)}
    found = allocate("global", summaries(scores, "global"), 0.5)
    assert sum(count(found[n], s.numel()) for n, s in scores.items()) == 150
