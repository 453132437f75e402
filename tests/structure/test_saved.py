"""What was cut loads again: by stock transformers where a config has its shapes, and by secateur.load everywhere."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from nets import NETS
from safetensors.torch import load_file, save_file

from conftest import TINY
from secateur.errors import SecateurError
from secateur.structure import apply_, load, plan, plan_layers, save, trace

SIZES = {"max_position_embeddings": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


def llama(**more):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TINY, **SIZES, **more}, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval()


def ids(length: int = 7) -> dict:
    return {"input_ids": torch.randint(32, (2, length), generator=torch.Generator().manual_seed(3)), "use_cache": False}


def cut(model, **request):
    config = copy.deepcopy(model.config)
    found = plan(trace(model, ids()), multiple=1, **request)
    apply_(model, found, ids())
    return found, config


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**ids(11)).logits


FAMILIES = {
    "LLaMA, grouped queries": (llama, {"ffn": 0.5, "heads": 0.5}, {"intermediate_size": 8, "num_key_value_heads": 1}),
    "LLaMA, hidden": (llama, {"hidden": 0.25}, {"hidden_size": 24}),
    "LLaMA, query heads": (llama, {"queries": 0.5}, {"num_attention_heads": 2, "num_key_value_heads": 2}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_uniform_results_load_with_stock_transformers(name, tmp_path):
    make, remove, fields = FAMILIES[name]
    model = make()
    found, config = cut(model, remove=remove)
    assert save(model, [found], tmp_path, config, [ids(), ids(11)]) == "stock"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in fields} == fields
    assert torch.equal(
        again.generate(ids()["input_ids"], max_new_tokens=5), model.generate(ids()["input_ids"], max_new_tokens=5)
    )
    torch.testing.assert_close(logits(load(tmp_path)), logits(model), rtol=1e-5, atol=1e-6)


def test_shapes_that_differ_by_layer_load_with_the_plan(tmp_path):
    model = llama()
    found, config = cut(model, remove={"model.layers.0.mlp*": 0.5, "model.layers.1.self_attn:heads": 0.5})
    assert save(model, [found], tmp_path, config, [ids()]) == "secateur.load"
    again = load(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-7)
    assert again.generate(ids()["input_ids"], max_new_tokens=3).shape == (2, 10)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):  # loud, not quietly wrong
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path, llama())), logits(model), rtol=1e-6, atol=1e-7)


def test_large_results_keep_their_shards_from_stock_libraries_too(tmp_path, monkeypatch):
    model = llama()
    found, config = cut(model, remove={"model.layers.0.mlp*": 0.5})
    whole = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda own, out: whole(own, out, max_shard_size="8KB"))
    assert save(model, [found], tmp_path, config, [ids()]) == "secateur.load"
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(logits(load(tmp_path)), logits(model), rtol=1e-6, atol=1e-7)
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_dropped_layers_and_widths_load_with_stock_transformers(tmp_path):
    model = llama(num_hidden_layers=4)
    config = copy.deepcopy(model.config)
    first = plan_layers(model, ids(), 2)
    apply_(model, first, ids())
    second, _ = cut(model, remove={"ffn": 0.5})
    assert save(model, [first, second], tmp_path, config, [ids(), ids(11)]) == "stock"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["residual convolutions", "multihead attention", "lstm", "masked by torch"])
def test_modules_of_your_own_load_into_a_fresh_one(name, tmp_path):
    torch.manual_seed(0)
    model, inputs = NETS[name]()
    torch.manual_seed(0)
    fresh, _ = NETS[name]()
    found = plan(trace(model.eval(), inputs), target={"params": 0.6}, least=0.05)
    apply_(model, found, inputs)
    save(model, [found], tmp_path, checks=[inputs])
    with pytest.raises(SecateurError, match="give one from before the cut"):
        load(tmp_path)
    again = load(tmp_path, fresh)
    with torch.no_grad():
        torch.testing.assert_close(again(inputs), model(inputs), rtol=1e-6, atol=1e-7)


def test_a_damaged_weight_is_noticed(tmp_path):
    torch.manual_seed(0)
    model, inputs = NETS["residual convolutions"]()
    fresh, _ = NETS["residual convolutions"]()
    found = plan(trace(model.eval(), inputs), target={"params": 0.6})
    apply_(model, found, inputs)
    save(model, [found], tmp_path, checks=[inputs])
    weights = load_file(tmp_path / "model.safetensors")
    weights["a.weight"] *= 1.5
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(SecateurError, match="changed or damaged"):
        load(tmp_path, fresh)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda p: (p / "secateur.json").unlink(), "no result of secateur"),
        (lambda p: (p / "secateur.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "secateur.json").write_text("{}"), "pruned in its weights"),
    ],
)
def test_folders_that_are_none_are_refused(spoil, words, tmp_path):
    model, inputs = NETS["mlp"]()
    found = plan(trace(model, inputs), target={"params": 0.6})
    apply_(model, found, inputs)
    save(model, [found], tmp_path)
    spoil(tmp_path)
    with pytest.raises(SecateurError, match=words):
        load(tmp_path, NETS["mlp"]()[0])


def test_kept_indices_are_written_down(tmp_path):
    """Distillation matches teacher and student by them."""
    model = llama()
    before = copy.deepcopy(model)
    found, config = cut(model, remove={"ffn": 0.5})
    save(model, [found], tmp_path, config)
    written = json.loads((tmp_path / "secateur.json").read_text())["plans"][0]["tensors"]
    for name, change in written.items():
        old, new = before.state_dict()[name], model.state_dict()[name]
        for dim, kept in change["kept"].items():
            indices = torch.cat([torch.arange(a, b) for a, b in kept])
            old = old.index_select(int(dim), indices)
        assert torch.equal(old, new)
