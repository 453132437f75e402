"""Attention or MLPs that go alone: found by what they do, right by hand, with caches that follow."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import secateur
from conftest import TINY
from secateur.errors import SecateurError
from secateur.structure import Plan, apply_, plan, plan_layers, plan_sublayers, save, trace
from secateur.structure.proof import Wrong
from secateur.structure.running import Cached, cached, check_cached
from secateur.structure.sublayers import (
    check_remove,
    remove_,
    replace_by_nothing_,
    sublayer_influence,
    sublayers,
    with_unread,
)

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values`")  # renamed in newer versions
IDS = {"input_ids": torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(3)), "use_cache": False}


def decoder(kind="Llama", layers=4, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        **{**TINY, "num_hidden_layers": layers, "max_position_embeddings": 64, **more}, initializer_range=0.3
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def found_in(model, inputs=IDS):
    return sublayers(model, lambda: model(**inputs))


def kinds(model, inputs=IDS):
    return {name.partition("layers.")[2]: was.kind for name, was in found_in(model, inputs).items()}


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return transformers.BertModel(config).eval()


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Mixtral", "StableLm"])
def test_attention_and_mlp_of_every_block(kind):
    found = found_in(decoder(kind, layers=2))
    assert [was.kind for was in found.values()] == ["attention", "mlp"] * 2
    assert all(was.hands_on == -1 for was in found.values())


def test_linear_layers_without_a_module_around_them():
    """OPT's MLP is two linear layers of the block itself: the second is what adds, the first only feeds it."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16
    )
    model = transformers.OPTForCausalLM(config).eval()  # as wide as the hidden state, so that shapes tell nothing
    assert kinds(model) == {"0.self_attn": "attention", "0.fc2": "mlp", "1.self_attn": "attention", "1.fc2": "mlp"}
    found = found_in(model)
    absent = with_unread(
        model, {"model.decoder.layers.1.fc2": found["model.decoder.layers.1.fc2"]}, lambda: model(**IDS)
    )
    unread = {name.rpartition(".")[2] for name, was in absent.items() if was.kind == "unread"}
    assert unread == {"fc1", "final_layer_norm"}


def test_a_norm_that_both_read_stays():
    """GPT-J feeds attention and MLP from one norm."""
    torch.manual_seed(0)
    config = transformers.GPTJConfig(vocab_size=32, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=64)
    model = transformers.GPTJForCausalLM(config).eval()
    one = plan_sublayers(model, IDS, {"mlp": 1})
    assert [was.kind for was in one.sublayers.values()] == ["mlp"]


def test_blocks_that_normalize_the_sum_hand_on_their_input():
    model = bert()
    inputs = {"input_ids": IDS["input_ids"]}
    found = found_in(model, inputs)
    assert {was.kind for was in found.values()} == {"attention", "mlp"}
    assert {was.hands_on for was in found.values()} == {0, 1}
    states = []
    handle = model.encoder.layer[1].register_forward_hook(lambda m, args, out: states.append((args[0], out)))
    name = next(name for name, was in found.items() if was.kind == "mlp" and ".1." in name)
    apply_(model, plan_sublayers(model, inputs, {"mlp": 1}, scores=dict.fromkeys(found, 1.0) | {name: 0.0}), inputs)
    model(**inputs)
    handle.remove()
    given, out = states[-1]
    block = model.encoder.layer[1]
    want = block.attention(given)
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, want[0] if isinstance(want, tuple) else want)


def test_cross_attention_is_attention():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    inputs = {**IDS, "decoder_input_ids": IDS["input_ids"][:, :4]}
    found = found_in(model, inputs)
    assert [was.kind for name, was in found.items() if name.startswith("decoder.block.1")] == ["attention"] * 2 + [
        "mlp"
    ]
    removed = plan_sublayers(model, inputs, {"attention": 1}, scores={n: float(p) for p, n in enumerate(found)})
    assert "encoder.block.0.layer.0" in removed.protected  # it holds the position biases of all
    apply_(model, removed, inputs)
    assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_without_one_by_hand(kind):
    """A block without attention is x + mlp(norm(x)); without MLP, x + attention(norm(x))."""
    model = decoder(layers=2)
    block, x = model.model.layers[1], torch.randn(2, 5, 8)
    rope = model.model.rotary_emb(x, torch.arange(5)[None])
    with torch.no_grad():
        if kind == "attention":
            want = x + block.mlp(block.post_attention_layernorm(x))
        else:
            want = x + block.self_attn(block.input_layernorm(x), position_embeddings=rope, attention_mask=None)[0]
        name = "model.layers.1." + ("self_attn" if kind == "attention" else "mlp")
        absent = with_unread(model, {name: found_in(model)[name]}, lambda: model(**IDS))
        remove_(model, absent)
        got = model.model.layers[1](x, position_embeddings=rope)
    torch.testing.assert_close(got, want)
    norms = [name for name, _ in model.named_parameters() if name.startswith("model.layers.1.") and "norm" in name]
    assert len(norms) == 1  # the other one fed what is gone


def test_influence_by_hand():
    model = decoder(layers=2)
    states = []
    hook = model.model.layers[0].register_forward_hook(
        lambda m, args, kwargs, out: states.append((args[0], out)), with_kwargs=True
    )
    with torch.no_grad():
        model(**IDS)
        hook.remove()
        x, whole = states[0]
        block = model.model.layers[0]
        without = x + block.mlp(block.post_attention_layernorm(x))
    want = 1 - float(F.cosine_similarity(whole, without, dim=-1).mean())
    found = found_in(model)
    assert abs(sublayer_influence(model, [IDS], found)["model.layers.0.self_attn"] - want) < 1e-6


def continued(model):
    """How far logits behind a cache are from those of a single forward."""
    ids = IDS["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        start = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=start.past_key_values, use_cache=True)
    return float((whole[:, 4:] - rest.logits).abs().max())


@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "Qwen3", "Mistral"])
@pytest.mark.parametrize("gone", [[0], [1], [0, 1], [1, 2, 3]])
def test_caches_follow(kind, gone):
    model = decoder(kind)
    found = found_in(model)
    absent = {name: found[name] for name in (f"model.layers.{place}.self_attn" for place in gone)}
    remove_(model, absent)
    assert continued(model) < 1e-4
    assert cached(model, IDS) == Cached(True, 7)


def test_a_cache_that_does_not_follow_is_seen():
    """The first slot of a cache says how long it is: without its attention the numbers have to move up."""
    model = decoder()
    found = found_in(model)
    replace_by_nothing_(model, {"model.layers.0.self_attn": found["model.layers.0.self_attn"]})
    assert continued(model) > 0.1
    with pytest.raises(Wrong, match="something else with its cache"):
        check_cached(model, IDS, Cached(True, 7))


def test_what_leaves_a_cache_without_its_first_slot_is_not_chosen():
    """Gemma 2 with full attention alone: nothing fills the slots of sliding attention, of which one is the first."""
    model = decoder("Gemma2")
    found = found_in(model)
    scores = {name: float(place % 4) for place, name in enumerate(found)}  # layers 0 and 2 before 1 and 3
    removed = plan_sublayers(model, IDS, {"attention": 2}, scores=scores)
    assert "not together with model.layers.0.self_attn" in removed.protected["model.layers.2.self_attn"]
    apply_(model, removed, IDS)
    assert continued(model) < 1e-4


def test_slots_are_those_of_the_same_type():
    model = decoder("Gemma2")
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2
    remove_(model, {"model.layers.0.self_attn": found_in(model)["model.layers.0.self_attn"]})
    assert [layer.self_attn.layer_idx for layer in model.model.layers[1:]] == [1, 0, 3]


def test_it_is_undone():
    model = decoder()
    before, names = model(**IDS).logits, [name for name, _ in model.named_parameters()]
    absent = {name: was for name, was in found_in(model).items() if ".1." in name or ".0.self" in name}
    assert check_remove(model, absent, lambda: model(**IDS)) < 1e-6
    assert [name for name, _ in model.named_parameters()] == names
    assert torch.equal(model(**IDS).logits, before)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


def test_plan_apply_save_load(tmp_path):
    model = decoder()
    config = copy.deepcopy(model.config)
    first = plan_sublayers(model, IDS, {"attention": 2, "mlp": 0.25})
    assert sorted(was.kind for was in first.sublayers.values()) == ["attention"] * 2 + ["mlp"] + ["unread"] * 3
    assert Plan.from_json(first.to_json()) == first
    apply_(model, first, IDS)
    assert first.after["params"] == sum(p.numel() for p in model.parameters())
    second = plan_layers(model, IDS, 1)
    apply_(model, second, IDS)
    third = plan(trace(model, IDS), remove={"ffn": 0.5}, multiple=1)
    apply_(model, third, IDS)
    assert save(model, [first, second, third], tmp_path, config, [IDS]) == "secateur.load"
    again = secateur.load(tmp_path)
    torch.testing.assert_close(again(**IDS).logits, model(**IDS).logits)
    write = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(
        again.generate(IDS["input_ids"], **write), model.generate(IDS["input_ids"], use_cache=False, **write)
    )


def test_those_with_least_influence_go_and_protected_ones_stay():
    model = decoder()
    scores = {name: float(place) for place, name in enumerate(found_in(model))}
    removed = plan_sublayers(model, IDS, {"attention": 1}, scores=scores).sublayers
    assert "model.layers.0.self_attn" in removed
    removed = plan_sublayers(model, IDS, {"attention": 1}, scores=scores, protect=["model.layers.0.*"]).sublayers
    assert "model.layers.1.self_attn" in removed


@pytest.mark.parametrize(
    ("remove", "says"),
    [({"attention": 5}, "4 sublayers"), ({"mlp": 0}, "mlp=0"), ({"convolution": 1}, "unknown kind of sublayer")],
)
def test_requests_that_make_no_sense(remove, says):
    with pytest.raises(SecateurError, match=says):
        plan_sublayers(decoder(), IDS, remove)


def test_a_plan_for_another_model_leaves_it_as_it_was():
    removed = plan_sublayers(decoder(), IDS, {"attention": 1}, scores={"model.layers.3.self_attn": 0.0})
    other = decoder(layers=2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(SecateurError, match=r"weights in model\.layers\.3"):
        apply_(other, removed, IDS)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    model = decoder()
    apply_(model, removed, IDS)
    with pytest.raises(SecateurError, match="applied already"):
        apply_(model, removed, IDS)


def test_blocks_with_a_single_part_have_none():
    stack = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)))
    assert sublayers(stack, lambda: stack(torch.randn(2, 3, 4))) == {}


def test_widths_after_sublayers():
    """What stands in for a sublayer says nothing of its own about sizes; OPT's has to."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16
    )
    for model in (decoder(), transformers.OPTForCausalLM(config).eval()):
        width = model.get_input_embeddings().weight.shape[1]
        apply_(model, plan_sublayers(model, IDS, {"attention": 1, "mlp": 1}), IDS)
        apply_(model, plan(trace(model, IDS), remove={"hidden": 0.5, "ffn": 0.5}, multiple=1), IDS)
        assert model.get_input_embeddings().weight.shape[1] == width // 2


def test_a_block_that_has_lost_both_is_a_block():
    """Gemma 2 keeps the norms behind what is gone: what remains of the block has no matrix."""
    model = decoder("Gemma2", layers=3)
    kinds_before = {c.kind for c in trace(model, IDS)}
    found = found_in(model)
    scores = {name: float(".1." not in name) for name in found}
    apply_(model, plan_sublayers(model, IDS, {"attention": 1, "mlp": 1}, scores=scores), IDS)
    assert {c.kind for c in trace(model, IDS)} == kinds_before
