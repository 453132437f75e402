"""What comes before a layer is kept: the answers stay what they were, whatever the model does between its modules."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from secateur.strategy.prefix import given, outputs_before, watch


class Residual(nn.Module):
    """Adds in place to what a module gave, and has an activation that writes into the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(8, 8), nn.ReLU(inplace=True)
        self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        y = self.second(self.act(x))
        y += x  # after the activation wrote into it
        y.mul_(2)
        return self.third(y)


class Twice(nn.Module):
    """One module called twice, the second time inside another; a tuple between them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.split = Split()
        self.block = nn.Sequential(self.shared, nn.Tanh(), nn.Linear(8, 8))
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        one, two = self.split(self.shared(x))
        return self.last(self.block(one) * two)


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16)

    def forward(self, x):
        return self.inner(x).tanh().chunk(2, -1)


class Tied(nn.Module):
    """The last layer's weight is the first one's too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.middle(self.first(x)).relu())


class Borrowed(nn.Module):
    """A weight used without a call of its module, by a forward that forgives errors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        try:
            x = self.last(x @ self.second.weight)
        except Exception:
            return x
        return x


class Written(nn.Module):
    """Its forward is its instance's own, and one child is a script."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.script = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        plain = self.first.forward
        self.first.forward = lambda x: plain(x) * 3

    def forward(self, x):
        return self.last(self.script(self.first(x)))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 8)), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def images() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 1), norm, nn.ReLU(True), nn.Dropout(0.5), nn.Conv2d(3, 3, 2),
        nn.Flatten(), nn.Linear(3, 4),
    )  # fmt: skip


MAKERS = [Residual, Twice, Tied, Borrowed, Written, encoder, images]


def weights(maker) -> list[str]:
    return [name for name, p in maker().named_parameters(remove_duplicate=False) if p.ndim > 1]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("maker", "name"), [(maker, name) for maker in MAKERS for name in weights(maker)])
def test_a_cut_answers_the_same_from_what_was_kept(maker, name):
    torch.manual_seed(0)
    model = maker().eval()
    parameter, x = model.get_parameter(name), torch.randn(5, 8)
    forwards = {module: module.__dict__.get("forward") for module in model.modules()}
    kept = outputs_before(model, parameter, x.clone())
    with torch.no_grad():
        parameter.mul_(torch.rand_like(parameter) > 0.7)
        expected = model(x.clone())
        for _ in range(2):
            with given(kept):
                assert torch.allclose(model(x.clone()), expected, atol=1e-6)
    assert {module: module.__dict__.get("forward") for module in model.modules()} == forwards
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def calls(model: nn.Module, kept, x) -> list[str]:
    """Which linear layers compute."""
    found = []
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                plain = module.forward
                module.forward = lambda *a, name=name, plain=plain: found.append(name) or plain(*a)
                stack.callback(module.__dict__.pop, "forward")
        with given(kept), torch.no_grad():
            model(x)
    return found


def test_only_what_comes_after_is_computed():
    model, x = Residual().eval(), torch.randn(5, 8)
    assert calls(model, outputs_before(model, model.third.weight, x), x) == ["third"]
    assert calls(model, outputs_before(model, model.second.weight, x), x) == ["second", "third"]
    model = Twice().eval()
    assert calls(model, outputs_before(model, model.last.weight, x), x) == ["last"]
    model = Tied().eval()  # cut at both ends
    assert calls(model, outputs_before(model, model.last.weight, x), x) == ["first", "middle", "last"]


def test_nothing_is_kept_beyond_the_limit_or_where_a_weight_is_never_used():
    model, x = Residual().eval(), torch.randn(5, 8)
    size = 2 * 5 * 8 * 4  # of two linear layers; the activation writes into its input
    assert len(outputs_before(model, model.third.weight, x, size)) == 2
    assert outputs_before(model, model.third.weight, x, size - 1) == []
    model.idle = nn.Linear(8, 8)
    assert outputs_before(model, model.idle.weight, x) == []


def test_a_forward_says_where_every_weight_is_needed_and_how_much_it_gives():
    model, x = Residual().eval(), torch.randn(5, 8)
    seen = watch(model, dict(model.named_parameters()), x)
    order = [seen.begins[f"{name}.weight"] for name in ("first", "second", "third")]
    assert order == sorted(order)
    assert 0 <= order[0] < order[2] <= 1
    assert (seen.largest, seen.all) == (5 * 8 * 4, (3 * 8 + 4) * 5 * 4)
