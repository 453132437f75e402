"""Oracles: x.T @ x from forward hooks, and convolutions that have to come out of their patches again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.stream.observe import Watched, collect, unfold
from secateur.weights.layers import all_layers
from secateur.weights.stats import Inputs


def observe(model: nn.Module, *batches: Any, gram: bool = True) -> tuple[dict[str, Inputs], dict[str, bool]]:
    """Watch every weight matrix of a model while the batches pass it."""
    names: dict[str, list[str]] = {}
    for layer, _ in all_layers(model):
        names.setdefault(layer.parameter, []).append(layer.name)

    def run() -> Any:
        for index, batch in enumerate(batches):
            model(*(batch if isinstance(batch, tuple) else (batch,)))
            yield index

    with torch.no_grad():
        return collect(run, [Watched(model.get_parameter(p), n) for p, n in names.items()], gram)


def hooked(model: nn.Module, *batches: Any) -> dict[str, Tensor]:
    """The tokens that each module with a matrix was fed: [tokens, in]."""
    seen: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args: seen.setdefault(name, []).append(args[0].flatten(0, -2))

    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in modules]
    with torch.no_grad():
        for batch in batches:
            model(*(batch if isinstance(batch, tuple) else (batch,)))
    for handle in hooks:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def check(found: Inputs, tokens: Tensor, rtol: float = 1e-5) -> None:
    """found against the tokens themselves: [tokens, in] or [groups, tokens, in]."""
    tokens = tokens if tokens.ndim == 3 else tokens[None]
    tokens = tokens.double()
    assert found.tokens == tokens.shape[1]
    found.complete()
    assert found.squares is not None
    torch.testing.assert_close(found.squares.double(), tokens.square().sum(1), rtol=rtol, atol=1e-5)
    if found.gram is not None:
        torch.testing.assert_close(found.gram.double(), tokens.mT @ tokens, rtol=rtol, atol=1e-4)
    kept = torch.cat(found.sample, 1).double()
    assert all(any(torch.equal(k, t) for t in tokens[0]) for k in kept[0]), "the sample consists of tokens that came by"


# Layers


class Both(nn.Module):
    """A Linear and a Conv1D, one after the other."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 7, bias=bias), Conv1D(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


@given(
    st.lists(st.lists(st.integers(1, 4), min_size=0, max_size=3), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_linear_layers(shapes: list[list[int]], bias: bool, gram: bool) -> None:
    model = Both(bias)
    batches = [torch.randn(*shape, 3, 5) for shape in shapes]
    found, _ = observe(model, *batches, gram=gram)
    expected = hooked(model, *batches)
    assert set(found) == {"one", "two"}
    for name, tokens in expected.items():
        check(found[name], tokens)
        assert (found[name].gram is not None) == gram


def test_a_single_token_without_dimensions() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    x = torch.randn(5)
    check(observe(model, x)[0]["0"], x[None])


def test_no_tokens() -> None:
    found, _ = observe(nn.Sequential(nn.Linear(5, 3)), torch.randn(0, 5))
    assert found == {}


def test_half_precision_is_summed_in_float32() -> None:
    model = nn.Sequential(nn.Linear(5, 3)).bfloat16()
    x = 100 + torch.randn(4096, 5).bfloat16()
    check(observe(model, x)[0]["0"], x, rtol=1e-4)  # bfloat16 would be off by 1 %


class Raw(nn.Module):
    """Weights used in every way but by calling their module."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 6, bias=False), nn.Linear(5, 6, bias=False)
        self.some, self.single = nn.Linear(5, 6, bias=False), nn.Linear(5, 6, bias=False)
        self.unused = nn.Linear(5, 6)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a = x @ self.right.weight.t()
        b = (self.left.weight @ y.t()).t()  # the weight first
        c = nn.functional.linear(x, self.some.weight[:3])  # a part of it
        d = self.single.weight @ x[0]  # matrix times vector
        return a.sum() + b.sum() + c.sum() + d.sum()


def test_raw_use_of_weights() -> None:
    x, y = torch.randn(4, 5), torch.randn(3, 5)
    found, _ = observe(Raw(), (x, y))
    assert set(found) == {"left", "right", "some", "single"}
    check(found["right"], x)
    check(found["left"], y)
    check(found["some"], x)
    check(found["single"], x[:1])


def test_fused_attention_projections() -> None:
    """nn.MultiheadAttention multiplies with thirds of one parameter, or with out_proj.weight as it is."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train()  # in eval mode one fused kernel does it all
    x = torch.randn(2, 3, 8)
    found, _ = observe(attention, (x, x, x))
    projected = [name for name in found if "in_proj" in name]
    assert projected
    check(found[projected[0]], x.flatten(0, 1))
    assert any("out_proj" in name for name in found)


# Convolutions


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    numbers = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    kernel, stride, dilation, padding = numbers(1, 3), numbers(1, 3), numbers(1, 2), numbers(0, 2)
    channels, out = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "reflect"]))
    conv = kind(channels, out, kernel, stride, padding, dilation, groups, draw(st.booleans()), mode)
    size = tuple(draw(st.integers(5, 7)) for _ in range(dims))
    return conv, torch.randn(draw(st.integers(1, 3)), channels, *size)


def from_patches(weight: Tensor, patches: Tensor, like: Tensor) -> Tensor:
    """weight_matrix @ patches for each group, in the shape of the convolution's output."""
    groups = patches.shape[0]
    matrices = weight.flatten(1).unflatten(0, (groups, -1))  # [groups, out/groups, in]
    out = torch.einsum("goi,gti->got", matrices, patches).flatten(0, 1)  # [out, n * places]
    n, places = like.shape[0], like.shape[2:]
    return out.unflatten(1, (n, *places)).transpose(0, 1)


@given(convolutions())
def test_a_convolution_comes_out_of_its_patches(drawn: tuple[nn.Module, Tensor]) -> None:
    conv, x = drawn
    weight = conv.weight.detach()
    padding = conv.padding if conv.padding_mode == "zeros" else (0,) * len(conv.padding)
    expanded = x
    if conv.padding_mode != "zeros":
        expanded = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
    patches = unfold(expanded, weight.shape[2:], conv.stride, padding, conv.dilation, conv.groups)
    with torch.no_grad():
        out = conv(x)
    plain = out if conv.bias is None else out - conv.bias.view(-1, *[1] * (out.ndim - 2))
    torch.testing.assert_close(from_patches(weight, patches, out), plain.detach(), rtol=1e-4, atol=1e-5)
    found, _ = observe(nn.Sequential(conv), x)
    check(found["0"], patches)


def test_a_convolution_named_same() -> None:
    conv = nn.Conv2d(2, 3, 3, padding="same")
    x = torch.randn(2, 2, 5, 4)
    found, _ = observe(nn.Sequential(conv), x)
    check(found["0"], unfold(x, (3, 3), (1, 1), (1, 1), (1, 1), 1))


def test_a_large_convolution_is_unfolded_in_parts() -> None:
    conv = nn.Conv2d(3, 2, 5, padding=2)
    x = torch.randn(4, 3, 160, 160)
    found, _ = observe(nn.Sequential(conv), x)
    assert found["0"].tokens == 4 * 160 * 160
    found["0"].complete()
    patches = unfold(x, (5, 5), (1, 1), (2, 2), (1, 1), 1).double()
    torch.testing.assert_close(found["0"].gram.double(), patches.mT @ patches, rtol=1e-4, atol=1e-1)


def test_transposed_convolutions_are_left_out() -> None:
    found, _ = observe(nn.Sequential(nn.ConvTranspose2d(2, 3, 3)), torch.randn(1, 2, 4, 4))
    assert found == {}


# Experts


class Experts(nn.Module):
    """Stacked experts as transformers has them: [experts, out, in], or [experts, in, out]."""

    def __init__(self, transposed: bool, how: str, experts: int = 3, width: int = 5, out: int = 4) -> None:
        super().__init__()
        shape = (experts, width, out) if transposed else (experts, out, width)
        self.stack = nn.Parameter(torch.randn(shape))
        self.transposed, self.how = transposed, how

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        """x: [tokens, in]; chosen: an expert per token."""
        if self.how == "bmm":
            every = x.expand(len(self.stack), *x.shape)
            return torch.bmm(every, self.stack if self.transposed else self.stack.mT)
        parts = []
        for index in chosen.unique().tolist():
            mine = x[chosen == index]
            weight = self.stack[index]
            parts.append(mine @ weight if self.transposed else nn.functional.linear(mine, weight))
        return torch.cat(parts)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_one_by_one(transposed: bool) -> None:
    model = Experts(transposed, "loop")
    x, chosen = torch.randn(10, 5), torch.tensor([0, 2, 2, 0, 2, 2, 2, 0, 0, 2])
    found, turned = observe(model, (x, chosen), (x[:4], chosen[:4]))
    assert set(found) == {"stack[0]", "stack[2]"}, "expert 1 saw nothing"
    for index in (0, 2):
        check(found[f"stack[{index}]"], torch.cat([x[chosen == index], x[:4][chosen[:4] == index]]))
        assert turned[f"stack[{index}]"] == transposed


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_all_at_once(transposed: bool) -> None:
    model = Experts(transposed, "bmm")
    x = torch.randn(6, 5)
    found, turned = observe(model, (x, torch.zeros(6)))
    assert set(found) == {"stack[0]", "stack[1]", "stack[2]"}
    for name, inputs in found.items():
        check(inputs, x)
        assert turned[name] == transposed


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_the_other_order(transposed: bool) -> None:
    """weight @ x' instead of x @ weight'."""

    class Flipped(Experts):
        def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
            weight = self.stack[1]
            return (weight.t() if self.transposed else weight) @ x.t()

    x = torch.randn(6, 5)
    found, turned = observe(Flipped(transposed, ""), (x, torch.zeros(6)))
    assert set(found) == {"stack[1]"}
    check(found["stack[1]"], x)
    assert turned["stack[1]"] == transposed


# Sharing


class Attention(nn.Module):
    """q, k and v read one tensor; by `apart` v reads another from that call on."""

    def __init__(
        self, apart: set[int] = frozenset(), skip: set[int] = frozenset(), first: set[int] = frozenset()
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(5, 5, bias=False) for _ in range(3))
        self.apart, self.skip, self.first, self.calls = apart, skip, first, 0

    def forward(self, x: Tensor) -> Tensor:
        call, self.calls = self.calls, self.calls + 1
        order = [self.q, self.k, self.v]
        if call in self.first:
            order.reverse()
        out = torch.zeros(())
        for layer in order:
            if layer is self.v and call in self.skip:
                continue
            out = out + layer(x * 2 if layer is self.v and call in self.apart else x)
        return out


def test_layers_with_one_input_share_it() -> None:
    found, _ = observe(Attention(), torch.randn(3, 5), torch.randn(2, 5))
    assert found["q"] is found["k"] is found["v"]
    assert found["q"].tokens == 5


def test_equal_values_are_not_the_same_input() -> None:
    found, _ = observe(Attention(apart={0, 1}), torch.randn(3, 5), torch.randn(2, 5))
    assert found["q"] is found["k"]
    assert found["q"] is not found["v"]


def test_an_input_that_changes_in_place_is_not_shared() -> None:
    class InPlace(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            one = self.q(x)
            return one + self.k(x.mul_(3)) + self.v(x)

    model, x = InPlace(), torch.randn(4, 5)
    found, _ = observe(model, x)
    check(found["q"], x)
    check(found["k"], 3 * x)
    assert found["k"] is found["v"]


def test_memory_that_is_used_again_is_another_input() -> None:
    """The allocator hands a freed tensor's memory to the next one: same address, same shape, other values."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(12)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x).tanh()
            return x

    model, x = Chain(), torch.randn(64, 64)
    found, _ = observe(model, x)
    assert len({id(inputs) for inputs in found.values()}) == 12
    for name, tokens in hooked(model, x).items():
        check(found[name], tokens)


@pytest.mark.parametrize(
    "model",
    [
        Attention(apart={1}),
        Attention(apart={0}),
        Attention(skip={1}),
        Attention(skip={0}),
        Attention(first={1}),
        Attention(apart={2}, skip={0}, first={1}),
    ],
    ids=["leaves", "joins late", "pauses", "begins late", "other order", "all of it"],
)
def test_layers_that_stop_sharing(model: Attention) -> None:
    """Every layer still has exactly the tokens that it was fed, none twice."""
    batches = [torch.randn(3, 5), torch.randn(2, 5), torch.randn(4, 5)]
    replays = []

    def run() -> Any:
        model.calls = 0
        replays.append(0)
        for index, batch in enumerate(batches):
            model(batch)
            yield index

    with torch.no_grad():
        found, _ = collect(run, [Watched(getattr(model, n).weight, [n]) for n in "qkv"], True)
    model.calls = 0
    for name, tokens in hooked(model, *batches).items():
        check(found[name], tokens)
    assert len(replays) <= 2


@given(st.lists(st.tuples(st.permutations("qkv"), st.sets(st.sampled_from("qkv"))), min_size=1, max_size=4))
def test_any_history_of_sharing(history: list[tuple[list[str], set[str]]]) -> None:
    """history: for each call the order of the layers, and those that get a tensor of their own."""
    layers = nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in "qkv"})
    batches = [torch.randn(2, 3) for _ in history]

    def run() -> Any:
        for index, (order, own) in enumerate(history):
            for name in order:
                layers[name](batches[index] + 1 if name in own else batches[index])
            yield index

    with torch.no_grad():
        found, _ = collect(run, [Watched(layers[name].weight, [name]) for name in "qkv"], True)
    for name in "qkv":
        fed = [batch + 1 if name in own else batch for batch, (_, own) in zip(batches, history, strict=True)]
        check(found[name], torch.cat(fed))
