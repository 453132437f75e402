"""Whole experts: found without a list of families, cut with their router, reloaded by stock transformers."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from conftest import TINY
from secateur.errors import SecateurError
from secateur.smaller import Smaller, remove
from secateur.stream.observe import make_observable
from secateur.structure import Plan, apply_, expert_scores, plan_experts, save
from secateur.structure.experts import TOLERANCE, check_experts, experts_cut, mixtures
from secateur.structure.surgery import Cut

IDS = {"input_ids": torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(3)), "use_cache": False}
KINDS = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4},
    "DeepseekV3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 2,
        "moe_intermediate_size": 8,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
        "num_key_value_heads": 2,
    },
}


def mixture(kind: str):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**TINY, **KINDS[kind]}, initializer_range=0.4)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    make_observable(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_removed_equals_never_chosen_and_reloads(kind, tmp_path):
    model = mixture(kind)
    config = copy.deepcopy(model.config)
    found = mixtures(model)
    assert len(found) == 2
    left = found[0].count // 2
    scores = {name: seen["usage"] for name, seen in expert_scores(model, [IDS]).items()}
    asked = plan_experts(model, IDS, left, scores)
    assert Plan.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    apply_(model, asked, IDS)
    assert asked.after["params"] == sum(p.numel() for p in model.parameters())
    assert all(len(model.get_parameter(m.stacks[0])) == left for m in mixtures(model))
    assert save(model, [asked], tmp_path, config, [IDS]) == "stock"


def test_a_wrong_cut_is_caught(monkeypatch):
    """The router keeps other rows than the experts that stay."""
    model = mixture("Mixtral")
    found = mixtures(model)
    kept = {m.name: np.array([0, 1]) for m in found}
    assert check_experts(model, found, kept, lambda: model(**IDS)) < 1e-6
    right = experts_cut(model, found, kept)
    wrong = Cut(
        {n: {0: np.array([2, 3])} if "gate.weight" in n else d for n, d in right.kept.items()}, right.attributes
    )
    monkeypatch.setattr("secateur.structure.experts.experts_cut", lambda *_: wrong)
    assert check_experts(model, found, kept, lambda: model(**IDS)) > TOLERANCE


def test_usage_by_hand():
    """Tokens per expert, from the router's own logits."""
    model = mixture("Mixtral")
    block = model.model.layers[0].mlp
    seen = []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**IDS)
    handle.remove()
    logits = F.linear(seen[0].reshape(-1, seen[0].shape[-1]), block.gate.weight)
    chosen = logits.topk(2, dim=-1).indices
    want = torch.bincount(chosen.flatten(), minlength=4).double()
    got = expert_scores(model, [IDS])["model.layers.0.mlp"]["usage"]
    torch.testing.assert_close(got, want / want.sum())


@pytest.mark.parametrize(
    ("kind", "left", "words"), [("Mixtral", 1, "2 to 3"), ("Mixtral", 4, "2 to 3"), ("DeepseekV3", 5, "multiple of 2")]
)
def test_numbers_that_routing_cannot_do_with(kind, left, words):
    model = mixture(kind)
    scores = {m.name: torch.rand(m.count) for m in mixtures(model)}
    with pytest.raises(SecateurError, match=words):
        plan_experts(model, IDS, left, scores)


def test_a_model_without_experts():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()
    with pytest.raises(SecateurError, match="no stacked experts"):
        plan_experts(model, IDS, 1, {})


def test_experts_from_the_command_line(tmp_path):
    mixture("Mixtral").save_pretrained(tmp_path / "model")
    found = remove(
        tmp_path / "model",
        Smaller(remove={"experts": 0.5, "ffn": 0.5}, criterion="magnitude", multiple=1),
        tmp_path / "out",
    )
    assert found.loads_with == "stock"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.num_local_experts == 2
    assert again.config.intermediate_size == 8
