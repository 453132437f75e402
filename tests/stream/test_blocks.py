"""Blocks are found from the module tree alone: named by hand for some models, and by laws for any."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from secateur.stream.blocks import find_blocks

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=3, num_key_value_heads=1, **SMALL))


def bert() -> nn.Module:
    return BertModel(BertConfig(vocab_size=32, num_hidden_layers=2, **SMALL))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))


def numbered(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{index}" for index in range(count)]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (llama, numbered("model.layers", 3)),
        (bert, numbered("encoder.layer", 2)),
        (gpt2, numbered("transformer.h", 2)),
        (t5, numbered("encoder.block", 2) + numbered("decoder.block", 2)),
    ],
)
def test_known_models(make: Callable[[], nn.Module], expected: list[str]) -> None:
    assert list(find_blocks(make())) == expected


class Block(nn.Module):
    def __init__(self, width: int = 4, inner: int = 0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        if inner:
            self.inner = nn.ModuleList([Block(width) for _ in range(inner)])


class Other(Block):
    pass


class Third(Block):
    pass


class Fourth(Block):
    pass


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        nn.ModuleList([Block()]),
        nn.Sequential(nn.ModuleList([Block(), Other(), Third(), Fourth()])),
        nn.Sequential(OrderedDict(heads=nn.ModuleList([Block(1), Block(1)]), big=nn.Linear(200, 200))),
    ],
    ids=["a layer", "layers", "a list of one", "four types", "a small list in a large model"],
)
def test_no_blocks(model: nn.Module) -> None:
    assert find_blocks(model) == {}


def test_the_outermost_lists_count() -> None:
    model = nn.Sequential(OrderedDict(body=nn.ModuleList([Block(inner=3), Block(inner=3)])))
    assert list(find_blocks(model)) == ["body.0", "body.1"]


def test_empty_places_in_a_list_are_left_out() -> None:
    model = nn.Sequential(OrderedDict(body=nn.ModuleList([Block(), nn.Identity(), Block()])))
    assert list(find_blocks(model)) == ["body.0", "body.2"]


def test_embeddings_do_not_count_against_the_blocks() -> None:
    model = nn.Sequential(OrderedDict(table=nn.Embedding(10_000, 8), body=nn.ModuleList([Block(), Block()])))
    assert list(find_blocks(model)) == ["body.0", "body.1"]


@st.composite
def trees(draw: st.DrawFn, depth: int = 3) -> nn.Module:
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from([Block, Other, Third, Fourth]))() if draw(st.booleans()) else nn.Linear(3, 3)
    children = draw(st.lists(trees(depth=depth - 1), min_size=1, max_size=3))
    if draw(st.booleans()):
        return nn.ModuleList(children)
    return nn.Sequential(OrderedDict((f"part{index}", child) for index, child in enumerate(children)))


@given(trees())
def test_laws(tree: nn.Module) -> None:
    model = nn.Sequential(OrderedDict(whole=tree))
    found = find_blocks(model)
    names = [name for name, _ in model.named_modules()]
    assert all(model.get_submodule(name) is block for name, block in found.items())
    assert sorted(found, key=names.index) == list(found), "in the order of registration"
    assert not any(other.startswith(f"{name}.") for name in found for other in found), "none inside another"
    assert not any(isinstance(block, (nn.ModuleList, nn.Sequential)) for block in found.values()), "each can be called"
    held = sum(parameter.numel() for block in found.values() for parameter in block.parameters())
    assert not found or held >= 0.2 * sum(parameter.numel() for parameter in model.parameters())
    assert len(found) != 1, "a single module is no repetition"
    wrapped = find_blocks(nn.Sequential(OrderedDict(outer=nn.Sequential(OrderedDict(inner=model)))))
    assert [name.removeprefix("outer.inner.") for name in wrapped] == list(found)


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert list(find_blocks(llama())) == numbered("model.layers", 3)
