"""The oracle: for every block run the whole forward again from scratch, with hooks, and prune by what they saw."""

import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from secateur.stream.blocks import find_blocks
from secateur.stream.walk import Stopped, walk


def linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_modules() if isinstance(child, (nn.Linear, Conv1D))}


def prune_by(norms: Mapping[str, Tensor], block: nn.Module) -> None:
    """Wanda in one line, by row."""
    for name, layer in linears(block).items():
        if name in norms:
            weight = layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.t()
            score = weight.abs() * norms[name].sqrt()
            weight.mul_(score > score.median(1, keepdim=True).values)


def watch(block: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """Sums of squares of what each linear layer of a block is fed during run()."""
    norms: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            norms[name] = norms.get(name, torch.zeros(())) + args[0].flatten(0, -2).square().sum(0)

        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in linears(block).items()]
    run()
    for handle in hooks:
        handle.remove()
    return norms


def by_walking(
    model: nn.Module, forward: Callable[[Any], Any], batches: list[Any], blocks: dict[str, nn.Module]
) -> None:
    for visit in walk(forward, blocks, batches):
        prune_by(watch(visit.module, lambda v=visit: list(v.replay())), visit.module)


@torch.no_grad()
def from_scratch(
    model: nn.Module, forward: Callable[[Any], Any], batches: list[Any], blocks: dict[str, nn.Module]
) -> None:
    for block in blocks.values():
        prune_by(watch(block, lambda: [forward(batch) for batch in batches]), block)


def llama() -> tuple[nn.Module, list[Any], Callable[[nn.Module, Any], Any]]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=32, num_hidden_layers=3, **sizes)
    return LlamaForCausalLM(config), ids(), lambda model, batch: model(input_ids=batch, use_cache=False)


def gpt2() -> tuple[nn.Module, list[Any], Callable[[nn.Module, Any], Any]]:
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return GPT2LMHeadModel(config), ids(), lambda model, batch: model(input_ids=batch, use_cache=False)


def t5() -> tuple[nn.Module, list[Any], Callable[[nn.Module, Any], Any]]:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    call = lambda model, batch: model(input_ids=batch, decoder_input_ids=batch, use_cache=False)  # noqa: E731
    return T5ForConditionalGeneration(config), ids(), call


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        return x + gain * self.second(torch.tanh(self.first(x)))


class Route(nn.Module):
    """Each batch takes its own route through the blocks."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(blocks)])

    def forward(self, x: Tensor, route: tuple[int, ...]) -> Tensor:
        for step, index in enumerate(route):
            x = self.blocks[index](x, gain=1 + step / 10)
        return x


def ids() -> list[Tensor]:
    return [torch.randint(32, (1, length), generator=torch.Generator().manual_seed(length)) for length in (5, 8, 3)]


@pytest.mark.parametrize("make", [llama, gpt2, t5])
def test_the_same_as_running_everything_from_scratch(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    walked, batches, call = make()
    walked.eval()
    scratch = copy.deepcopy(walked)
    before = copy.deepcopy(walked.state_dict())
    for model, how in ((walked, by_walking), (scratch, from_scratch)):
        how(model, lambda batch, m=model: call(m, batch), batches, find_blocks(model))
    found, expected = walked.state_dict(), scratch.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(found[name], before[name]) for name in expected)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, unique=True).map(sorted), min_size=1, max_size=4))
def test_batches_that_skip_blocks(routes: list[list[int]]) -> None:
    """Each batch enters only some blocks; the sums over batches are still those from scratch."""
    torch.manual_seed(1)
    walked = Route()
    scratch = copy.deepcopy(walked)
    batches = [(torch.randn(2, 3, 6), tuple(route)) for route in routes]
    for model, how in ((walked, by_walking), (scratch, from_scratch)):
        how(model, lambda batch, m=model: m(*batch), batches, dict(model.blocks.named_children()))
    assert all(torch.equal(a, b) for a, b in zip(walked.parameters(), scratch.parameters(), strict=True))


def test_a_block_that_is_entered_twice_is_visited_once() -> None:
    """The second time it runs with the weights it then has."""
    model = Route()
    blocks = dict(model.blocks.named_children())
    outputs: dict[int, Tensor] = {}
    x, route = torch.randn(2, 6), (0, 1, 0, 2, 1)
    names = []
    for visit in walk(lambda b: model(*b), blocks, [(x, route)], finish=outputs.__setitem__, to_the_end=[0]):
        names.append(visit.name)
        visit.module.first.weight.data.mul_(0.5)
    assert names == ["0", "1", "2"]
    with torch.no_grad():
        assert torch.equal(outputs[0], model(x, route)), "every call came after the change of its block"


def test_blocks_that_nothing_enters_are_not_visited() -> None:
    model = Route()
    visits = walk(lambda b: model(*b), dict(model.blocks.named_children()), [(torch.randn(1, 6), (0, 3))])
    assert [visit.name for visit in visits] == ["0", "3"]


def test_no_block_is_entered() -> None:
    model = Route()
    with pytest.raises(Stopped):
        list(walk(lambda b: model(*b), dict(model.blocks.named_children()), [(torch.randn(1, 6), ())]))


def test_without_batches_there_is_nothing_to_visit() -> None:
    model = Route()
    assert list(walk(lambda b: model(*b), dict(model.blocks.named_children()), [])) == []


def test_what_waits_at_a_block() -> None:
    model = Route()
    x = torch.randn(2, 6)
    for visit in walk(lambda b: model(*b), dict(model.blocks.named_children()), [(x, (0, 1)), (x, (1,))]):
        assert visit.module is model.blocks[int(visit.name)]
        assert [call.batch for call in visit.calls] == ([0] if visit.name == "0" else [0, 1])
        assert [call.kwargs["gain"] for call in visit.calls] == ([1.0] if visit.name == "0" else [1.1, 1.0])
        assert list(visit.replay(without=[0])) == ([] if visit.name == "0" else [1])


def test_only_those_asked_for_run_to_the_end() -> None:
    """The head after the last block is not computed for the others."""
    model = Route(2)
    ends: list[int] = []
    finished: dict[int, Tensor] = {}

    def forward(batch: tuple[Tensor, int]) -> Tensor:
        out = model(batch[0], (0, 1))
        ends.append(batch[1])
        return out

    batches = [(torch.randn(1, 6), index) for index in range(3)]
    for _ in walk(forward, dict(model.blocks.named_children()), batches, finish=finished.__setitem__, to_the_end=[1]):
        pass
    assert ends == [1]
    assert list(finished) == [1]
    with torch.no_grad():
        assert torch.equal(finished[1], model(batches[1][0], (0, 1)))


class Ledger:
    """A store that counts: what is loaded, and how often."""

    def __init__(self) -> None:
        self.inside: set[str] = set()
        self.most = 0

    def load(self, name: str, module: nn.Module) -> None:
        self.inside.add(name)
        self.most = max(self.most, len(self.inside))

    def free(self, name: str, module: nn.Module) -> None:
        self.inside.remove(name)


class Trouble(Exception):
    pass


def dies_in_the_forward(model: Route, visits: Any) -> None:
    list(visits)


def dies_in_the_caller(model: Route, visits: Any) -> None:
    next(visits)
    visits.throw(Trouble)


def dies_in_the_block(model: Route, visits: Any) -> None:
    for visit in visits:
        if visit.name == "1":
            visit.module.first.weight.data = torch.zeros(2, 2)  # the next batch to pass runs into it
    raise AssertionError


def stops_early(model: Route, visits: Any) -> None:
    next(visits)
    visits.close()
    raise Trouble


@pytest.mark.parametrize("death", [dies_in_the_forward, dies_in_the_caller, dies_in_the_block, stops_early])
def test_nothing_is_left_after_an_exception(death: Callable[[Route, Any], None]) -> None:
    """Hooks are removed, suspended forwards end (and run their clean-up), blocks are freed, gradients are as before."""
    model, ledger = Route(3), Ledger()
    alive: list[weakref.ref[greenlet]] = []
    cleaned: list[int] = []

    def forward(batch: int) -> Tensor:
        alive.append(weakref.ref(getcurrent()))
        try:
            out = model(torch.randn(1, 6), (0, 1, 2))
            if death is dies_in_the_forward and batch == 1:
                raise Trouble
            return out
        finally:
            cleaned.append(batch)

    visits = walk(forward, dict(model.blocks.named_children()), [0, 1, 2], ledger, to_the_end=range(3))
    with pytest.raises((Trouble, RuntimeError)):
        death(model, visits)
    assert sorted(cleaned) == [0, 1, 2]
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())
    assert ledger.inside == set()
    assert torch.is_grad_enabled()
    del visits
    gc.collect()
    assert all(ref() is None or ref().dead for ref in alive)


def test_one_block_at_a_time() -> None:
    model, ledger = Route(4), Ledger()
    batches = [(torch.randn(1, 6), (0, 1, 2, 3)), (torch.randn(1, 6), (1, 3))]
    assert len(list(walk(lambda b: model(*b), dict(model.blocks.named_children()), batches, ledger))) == 4
    assert (ledger.most, ledger.inside) == (1, set())


def test_no_gradients() -> None:
    model = Route(2)
    for visit in walk(lambda b: model(*b), dict(model.blocks.named_children()), [(torch.randn(1, 6), (0, 1))]):
        assert not visit.module(*visit.calls[0].args, **visit.calls[0].kwargs).requires_grad
    assert torch.is_grad_enabled()


def test_those_that_only_go_along_do_not_decide_the_order() -> None:
    """A rider that is at block 1 long before the data get there waits for them."""
    model = Route()
    x = torch.randn(2, 6)
    seen = []
    batches = [(x, (1, 3)), (x, (2, 1, 3))]  # the rider goes without block 2
    blocks = {"1": model.blocks[1], "2": model.blocks[2], "3": model.blocks[3]}
    for visit in walk(lambda b: model(*b), blocks, batches, to_the_end=[0]):
        seen.append((visit.name, [call.batch for call in visit.calls]))
    assert seen == [("2", [1]), ("1", [0, 1]), ("3", [0, 1])]
