"""Derivatives of the loss against loops of autograd in float64, and the Hessian's diagonal against the whole Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from problems import noise
from secateur.errors import SecateurError
from secateur.weights.gradients import Derivatives, derivatives

ALL = frozenset({"gradient", "fisher", "curvature"})
NAMES = ["0.weight", "2.weight"]
BATCHES = [(noise(4, 3, seed=i), noise(4, 2, seed=10 + i)) for i in range(3)]


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)
    for i, parameter in enumerate(model.parameters()):
        parameter.data = noise(*parameter.shape, seed=seed + i).to(dtype)
    return model


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = (part.to(model[0].weight.dtype) for part in batch)
    return (model(x) - y).square().mean()


def take(model: nn.Module, needs: frozenset[str] = ALL, probes: int = 1, seed: int = 0) -> dict[str, Derivatives]:
    return dict(derivatives(model, NAMES, BATCHES, loss, needs, probes, seed))


def exact(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over batches of g, g^2 and the diagonal of the Hessian, one by one in float64."""
    model = net(dtype=torch.float64)
    weight = model.get_parameter(name)
    sums = [torch.zeros_like(weight).flatten() for _ in range(3)]
    for batch in BATCHES:
        (g,) = torch.autograd.grad(loss(model, batch), weight, create_graph=True)
        for i, part in enumerate(g.flatten()):
            (row,) = torch.autograd.grad(part, weight, retain_graph=True)
            sums[0][i] += part.detach()
            sums[1][i] += part.detach() ** 2
            sums[2][i] += row.flatten()[i]
    return tuple(s.reshape(weight.shape).detach() for s in sums)


@pytest.mark.parametrize("name", NAMES)
def test_sums_over_batches(name: str):
    gradient, squares, _ = exact(name)
    found = take(net(), frozenset({"gradient", "fisher"}))[name]
    assert found.samples == len(BATCHES)
    torch.testing.assert_close(found.gradient.double(), gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.squares.double(), squares, rtol=1e-4, atol=1e-6)
    assert found.curvature is None


@pytest.mark.parametrize("name", NAMES)
def test_curvature_tends_to_the_hessian_s_diagonal(name: str):
    """The standard error of a mean of n probes falls as 1 / sqrt(n)."""
    _, _, diagonal = exact(name)
    few = [float((take(net(), probes=2, seed=s)[name].curvature - diagonal).norm()) for s in range(8)]
    many = float((take(net(), probes=800)[name].curvature - diagonal).norm())
    assert many < 0.15 * sum(few) / len(few)
    assert many < 0.1 * float(diagonal.norm())


class Separable(nn.Module):
    """A Hessian that is diagonal: E[z Hz] is exact for every single z."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(3, 5, seed=0))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.exp(0.3 * self.weight * x) + torch.sin(self.weight)).sum()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_single_probe_is_exact_where_the_hessian_is_diagonal(seed: int):
    model, xs = Separable(), [noise(3, 5, seed=s) for s in (1, 2)]
    found = derivatives(model, ["weight"], xs, lambda m, x: m(x), frozenset({"curvature"}), 1, seed)["weight"]
    w = model.weight.detach().double()
    expected = sum((0.3 * x.double()) ** 2 * torch.exp(0.3 * w * x.double()) - torch.sin(w) for x in xs)
    torch.testing.assert_close(found.curvature.double(), expected, rtol=1e-4, atol=1e-6)
    assert found.gradient is None
    assert found.squares is None


def test_the_same_seed_takes_the_same_probes():
    one, two, other = take(net(), seed=3), take(net(), seed=3), take(net(), seed=4)
    for name in NAMES:
        assert torch.equal(one[name].curvature, two[name].curvature)
        assert not torch.equal(one[name].curvature, other[name].curvature)


def test_the_model_is_left_as_it_was():
    model = net()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    take(model)
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_weights_and_no_grad_around_are_no_obstacle():
    model = net().requires_grad_(False)
    with torch.no_grad():
        found = take(model)
    torch.testing.assert_close(found["0.weight"].gradient.double(), exact("0.weight")[0], rtol=1e-4, atol=1e-6)


def test_progress_is_told_after_each_batch():
    seen: list[int] = []
    derivatives(net(), NAMES, BATCHES, loss, frozenset({"gradient"}), 1, 0, seen.append)
    assert seen == [0, 1, 2]


def test_bfloat16_gradients_are_summed_in_float32():
    found = take(net(dtype=torch.bfloat16))
    for name in NAMES:
        assert found[name].gradient.dtype == found[name].squares.dtype == found[name].curvature.dtype == torch.float32


def test_a_loss_without_curvature_has_curvature_zero():
    """Linear in the last layer's weights, not in the first's."""
    for name, curved in (("0.weight", True), ("2.weight", False)):
        found = derivatives(net(), [name], BATCHES, lambda m, b: m(b[0]).sum(), ALL, 2, 0)[name]
        assert found.curvature.shape == found.gradient.shape
        assert bool(found.curvature.any()) == curved


class Unrouted(nn.Module):
    """The second expert gets no token of the first batch, and the third none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return sum(expert(x).square().sum() for expert in self.experts[: int(x[0, 0]) + 1])


def test_parameters_that_a_batch_does_not_use_add_nothing():
    names = [f"experts.{i}.weight" for i in range(3)]
    batches = [torch.full((2, 3), float(i)) + 0.25 for i in range(2)]
    model = Unrouted()
    found = derivatives(model, names, batches, lambda m, x: m(x), ALL, 1, 0)
    alone = derivatives(model, names[1:2], batches[1:], lambda m, x: m(x), ALL, 1, 0)[names[1]]
    assert [found[name].samples for name in names] == [2, 2, 2]
    torch.testing.assert_close(found[names[1]].gradient, alone.gradient)
    never = found[names[2]]
    assert not any(bool(total.any()) for total in (never.gradient, never.squares, never.curvature))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda m, b: loss(m, b) * float("nan"), "loss of calibration batch 0 is nan"),
        (lambda m, b: loss(m, b) / 0, "loss of calibration batch 0 is inf"),
        (lambda m, b: m(b[0]), r"the loss has shape \[4, 2\]; expected a scalar"),
        (lambda m, b: loss(m, b).detach(), "depends on no weight"),
    ],
)
def test_a_loss_that_will_not_do_is_an_error(bad, message: str):
    model = net().requires_grad_(False)
    with pytest.raises(SecateurError, match=message):
        derivatives(model, NAMES, BATCHES, bad, ALL, 1, 0)
    assert not any(p.requires_grad for p in model.parameters())
