"""What cannot be traced, cut or applied ends in one clear error or a named protection; the model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from conftest import TINY
from secateur.errors import SecateurError
from secateur.structure import apply_, plan, trace
from secateur.structure.rules import RULES


class TwoLayers(nn.Module):
    """x -> b(act(a(x))), with something in between."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.between = nn.Linear(6, 8), nn.Linear(8, 3), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.randn(4, 7), "does not run on the example inputs"),
        ({"y": X}, "does not run on the example inputs"),
        ((X, X), "does not run on the example inputs"),
        ({}, "does not run on the example inputs"),
    ],
)
def test_example_inputs_that_do_not_fit(inputs, words):
    model = TwoLayers(nn.ReLU())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SecateurError, match=words) as raised:
        trace(model, inputs)
    assert "(x)" in str(raised.value)  # what forward takes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_cannot_be_followed_is_said_at_once():
    model = TwoLayers(nn.ReLU())
    with pytest.raises(SecateurError, match=r"under torch\.compile"):
        trace(torch.compile(model), X)
    with pytest.raises(SecateurError, match=r"model\.module"):
        trace(nn.DataParallel(model), X)
    with pytest.raises(SecateurError, match="no parameters"):
        trace(nn.ReLU(), X)
    scripted = torch.jit.trace(model, X)
    with pytest.raises(SecateurError, match="scripted"):
        trace(scripted, X)


def test_decisions_by_values_on_the_meta_device():
    def decide(x):
        return x if bool(x.sum() > 0) else -x

    model = TwoLayers(decide).to("meta")
    with pytest.raises(SecateurError, match="decisions by values"):
        trace(model, X)
    real = TwoLayers(decide)  # with values it can be traced
    assert [c.size for c in trace(real, X)] == [8]


def test_unknown_operators_protect_what_they_touch_and_are_named():
    model = TwoLayers(lambda x: torch.linalg.svd(x, full_matrices=False)[2])
    found = trace(model, X)
    assert len(found) == 0
    assert "no rule for this operator" in found.protected["a.weight:0"]
    assert "_linalg_svd" in found.protected["a.weight:0"]
    with pytest.raises(SecateurError, match="nothing can be removed"):
        plan(found, remove={"units": 0.5})


@pytest.mark.parametrize(
    "between",
    [
        lambda x: torch.as_strided(x, (4, 8), (8, 1)) if x.stride() != (8, 1) else torch.as_strided(x, (4, 8), (1, 1)),
        lambda x: x.view(torch.int16).view(torch.float32),
        lambda x: x[:, [1, 0, 2, 3, 4, 5, 7, 6]],
        lambda x: x.sort(-1).values,
        lambda x: x.cumsum(-1),
        lambda x: x.softmax(-1),
        lambda x: torch.roll(x, 1, 1),
        lambda x: x * torch.arange(8.0),
        lambda x: x.index_fill(1, torch.tensor([2]), 0.5),
        lambda x: torch.where(torch.arange(8) < 3, x, x.sin()),
    ],
)
def test_channels_that_depend_on_their_place_are_protected(between):
    model = TwoLayers(between)
    found = trace(model, X)
    assert "a.weight:0" in found.protected
    assert found.protected["a.weight:0"]


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.flip(1).flip(1),
        lambda x: torch.cat([x[:, :4], x[:, 4:]], 1).relu_(),
        lambda x: torch.stack([x, x], 0).sum(0),
        lambda x: x.unsqueeze(1).expand(-1, 3, -1).mean(1),
        lambda x: x.t().contiguous().t(),
        lambda x: torch.addcmul(x, x, x),
        lambda x: x.clone().mul_(2).clamp_(-1, 1),
    ],
)
def test_what_only_moves_channels_about_is_followed(between):
    model = TwoLayers(between)
    found = trace(model, X)
    assert [coupling.size for coupling in found] == [8]
    cut = plan(found, remove={found[0].name: 3}, multiple=1)
    assert cut.difference < 1e-9
    apply_(model, cut, X)
    assert model.a.out_features == model.b.in_features == 5


def test_a_width_that_breaks_grouped_queries_is_no_candidate():
    """Query heads go as many from each group, key-value heads with all of theirs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY | sizes)).eval()
    ids = {"input_ids": torch.arange(14).view(2, 7), "use_cache": False}
    found = trace(model, ids)
    assert {(c.kind, c.size) for c in found if c.kind in ("heads", "queries")} == {("heads", 2), ("queries", 3)}
    apply_(model, plan(found, remove={"queries": 1, "heads": 1}), ids)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.out_features == 16
    assert attention.k_proj.out_features == 8


def test_quantized_layers_are_protected():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    mixed = copy.deepcopy(model)
    mixed[2] = torch.ao.quantization.quantize_dynamic(nn.Sequential(model[2]), {nn.Linear})[0]
    found = trace(mixed, X)
    touched = {part.parameter for coupling in found for part in coupling.slices}
    assert not touched & {"0.weight", "4.weight"}


def test_every_rule_names_an_operator_that_exists():
    missing = [name for name in RULES if not hasattr(torch.ops.aten, name)]
    assert missing == []


def test_a_rule_that_meets_the_unexpected_protects(monkeypatch):
    """A call whose arguments its rule does not know is an unknown operator, not a crash."""

    def puzzled(call):
        raise IndexError("no such argument")

    monkeypatch.setitem(RULES, "sigmoid", puzzled)
    found = trace(TwoLayers(nn.Sigmoid()), X)
    assert "sigmoid: no rule" in found.protected["a.weight:0"]
    assert "aten.sigmoid.default" in found.facts.unknown


def test_weights_that_are_no_numbers_are_said():
    model = TwoLayers(nn.ReLU())
    with torch.no_grad():
        model.b.weight[1, 2] = torch.nan
    with pytest.raises(SecateurError, match=r"b\.weight has values that are NaN or infinite"):
        trace(model, X)
