"""Where parameters come from: the map gives the cut model's tensors out of the whole model's."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import TINY
from secateur.structure import apply_, parameter_map, plan, plan_layers, plan_sublayers, trace

IDS = {"input_ids": torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(3)), "use_cache": False}
STEPS = {
    "layers": lambda model: plan_layers(model, IDS, 1),
    "attention": lambda model: plan_sublayers(model, IDS, {"attention": 1}),
    "mlp": lambda model: plan_sublayers(model, IDS, {"mlp": 1}),
    "ffn": lambda model: plan(trace(model, IDS), remove={"ffn": 0.25}, multiple=1),
    "hidden": lambda model: plan(trace(model, IDS), remove={"hidden": 0.25}, multiple=1),
}


def decoder():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TINY, "num_hidden_layers": 4}, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config).eval()


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(list(STEPS)), count=st.integers(1, 4))
def test_every_tensor_is_what_is_left_of_its_origin(order, count):
    whole = decoder()
    model, plans = copy.deepcopy(whole), []
    for step in order[:count]:
        plans.append(STEPS[step](model))
        apply_(model, plans[-1], IDS)
    before, after = dict(whole.named_parameters()), dict(model.named_parameters())
    origins = parameter_map(plans, before)
    assert origins.keys() == after.keys()
    for name, origin in origins.items():
        assert torch.equal(origin.of(before[origin.name]), after[name])


def test_nothing_comes_from_itself():
    names = [name for name, _ in decoder().named_parameters()]
    origins = parameter_map([], names)
    assert {name: origin.name for name, origin in origins.items()} == {name: name for name in names}


@pytest.mark.parametrize("gone", [0, 3])
def test_blocks_move_up(gone):
    model = decoder()
    scores = {f"model.layers.{place}": float(place != gone) for place in range(4)}
    origins = parameter_map(
        plan_layers(model, IDS, 1, scores=scores), [f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)]
    )
    left = [n for n in range(4) if n != gone]
    assert {new: origin.name for new, origin in origins.items()} == {
        f"model.layers.{place}.mlp.up_proj.weight": f"model.layers.{old}.mlp.up_proj.weight"
        for place, old in enumerate(left)
    }
