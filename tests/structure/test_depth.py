"""Whole blocks that go: the right ones, renumbered, with a config and a cache that follow."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from conftest import TINY
from secateur.errors import SecateurError
from secateur.structure import apply_, plan_layers
from secateur.structure.depth import block_influence, check_drop, drop_, least_important, stacks

IDS = {"input_ids": torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(3)), "use_cache": False}


def decoder(kind="Llama", layers=5, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{**TINY, "num_hidden_layers": layers, "max_position_embeddings": 64, **more}, initializer_range=0.3
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def test_block_influence_by_hand():
    model = decoder()
    with torch.no_grad():
        states = model(**IDS, output_hidden_states=True).hidden_states
    found = block_influence(model, [IDS])
    for place in range(4):  # the last state is normalized
        want = 1 - float(F.cosine_similarity(states[place], states[place + 1], dim=-1).mean())
        assert abs(found[f"model.layers.{place}"] - want) < 1e-6


@pytest.mark.parametrize("place", range(5))
def test_dropped_equals_skipped(place):
    model = decoder()
    before = copy.deepcopy(model.state_dict())
    kept = {"model.layers": [p for p in range(5) if p != place]}
    assert check_drop(model, kept, lambda: model(**IDS)) == 0
    assert list(model.state_dict()) == list(before)
    assert model.config.num_hidden_layers == 5


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Qwen3", "Mistral"])
def test_numbers_config_and_cache_follow(kind):
    model = decoder(kind)
    drop_(model, {"model.layers": [0, 2, 4]})
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert model.config.num_hidden_layers == 3
    if getattr(model.config, "layer_types", None):
        assert len(model.config.layer_types) == 3
    with_cache = model.generate(IDS["input_ids"], max_new_tokens=6, do_sample=False, use_cache=True)
    without = model.generate(IDS["input_ids"], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)


def test_layer_types_are_those_of_the_layers_that_stay():
    model = decoder("Gemma2", layers=4)
    types = list(model.config.layer_types)
    drop_(model, {"model.layers": [0, 3]})
    assert list(model.config.layer_types) == [types[0], types[3]]


def test_a_plan_of_layers_reloads_in_stock_transformers(tmp_path):
    model = decoder()
    found = plan_layers(model, IDS, 2)
    apply_(model, found, IDS)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**IDS).logits, model(**IDS).logits)
    assert found.after["params"] == sum(p.numel() for p in again.parameters())


def test_the_least_influential_go_and_contiguous_ones_where_asked():
    model = decoder()
    scores = {f"model.layers.{n}": s for n, s in enumerate([0.5, 0.1, 0.9, 0.2, 0.3])}
    assert least_important(model, 2, scores) == ["model.layers.1", "model.layers.3"]
    assert least_important(model, 2, scores, contiguous=True) == ["model.layers.3", "model.layers.4"]
    assert least_important(model, 2, scores, protect={"model.layers.1"}) == ["model.layers.3", "model.layers.4"]


def test_a_block_that_others_need_stays():
    """T5's first blocks hold the position biases of all: others go in their place."""
    model = t5()
    inputs = {**IDS, "decoder_input_ids": IDS["input_ids"]}
    lists = stacks(model)
    scores = {name: float(place) for names in lists.values() for place, name in enumerate(names)}
    found = plan_layers(model, inputs, 2, scores=scores)
    assert all(0 in change.kept for change in found.layers.values())
    assert set(found.protected) == {"encoder.block.0", "decoder.block.0"}
    apply_(model, found, inputs)
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("count", [0, 5, 9, -1])
def test_counts_that_make_no_sense(count):
    with pytest.raises(SecateurError, match="some have to stay"):
        plan_layers(decoder(), IDS, count)


def test_a_model_without_blocks():
    with pytest.raises(SecateurError, match="0 blocks"):
        plan_layers(nn.Linear(3, 3), torch.randn(2, 3), 1)


def test_blocks_that_change_the_shape_cannot_go():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4 + n, 4 + n), nn.Linear(4 + n, 5 + n)) for n in range(3)))
    with pytest.raises(SecateurError):
        plan_layers(model, torch.randn(2, 4), 1)


def test_a_model_with_an_encoder_still_writes():
    """Stock transformers makes T5's cache by the encoder's count: with fewer blocks there than in the decoder it cannot
    write. Then blocks of the decoder go.
    """
    model = t5()
    inputs = {**IDS, "decoder_input_ids": IDS["input_ids"]}
    scores = {
        f"{side}.block.{place}": place + 10.0 * (side == "decoder")
        for side in ("encoder", "decoder")
        for place in range(3)
    }
    found = plan_layers(model, inputs, 1, scores=scores)
    assert list(found.layers) == ["decoder.block"]
    assert "does not generate" in found.protected["encoder.block.1"]
    apply_(model, found, inputs)
    write = {"max_new_tokens": 3, "do_sample": False}
    cached, plain = (model.generate(IDS["input_ids"], use_cache=use, **write) for use in (True, False))
    assert torch.equal(cached, plain)
