"""What is pruned, what is protected and why: decided by what a matrix is and where it stands."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from problems import noise
from secateur.errors import SecateurError
from secateur.stream.blocks import find_blocks
from secateur.weights.layers import Layer, Layers, all_layers, find_layers, matches

SMALL = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": None}


def llama(tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=16, num_key_value_heads=1, tie_word_embeddings=tied, eos_token_id=None
    )
    return transformers.LlamaForCausalLM(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        **SMALL, intermediate_size=16, num_key_value_heads=1, num_local_experts=4, eos_token_id=None
    )
    return transformers.MixtralForCausalLM(config)


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16, bos_token_id=None, eos_token_id=None
        )
    )


class Cnn(nn.Module):
    """No repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.grouped = nn.Conv2d(16, 12, (3, 2), groups=4)
        self.up = nn.ConvTranspose2d(12, 12, 2)
        self.hidden = nn.Linear(12, 6)
        self.classifier = nn.Linear(6, 10)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)


class ResNet(nn.Module):
    """Repeated blocks of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 7)
        self.stage = nn.Sequential(Residual(), Residual())
        self.fc = nn.Linear(8, 10)


class Mixture(nn.Module):
    """Experts of their own modules, and a router beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.route = nn.Linear(8, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.mix = nn.Linear(8, 8)


class Stack(nn.Module):
    """Three experts, of two matrices each."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = (nn.Parameter(noise(3, *s, seed=0)) for s in ((6, 4), (4, 6)))


class Odd(nn.Module):
    """One of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.lstm = nn.LSTM(8, 8)
        self.fused = nn.MultiheadAttention(8, 2)
        self.apart = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.score = nn.Linear(8, 1)
        self.normed = weight_norm(nn.Linear(8, 8))
        self.scale = nn.Parameter(noise(3, 8, seed=0))
        self.whole = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
        self.bias = nn.Parameter(torch.ones(4))


def split(model: nn.Module, **globs: Sequence[str]) -> Layers:
    return find_layers(model, find_blocks(model), **globs)


def names(found: Layers) -> list[str]:
    return [layer.name for layer in found.layers]


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder(tied: bool):
    found = split(llama(tied))
    linear = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    linear += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names(found) == [f"model.layers.{i}.{name}" for i in range(2) for name in linear]
    if tied:
        assert found.protected == {"model.embed_tokens": "output head, tied to the embedding"}
    else:
        assert found.protected == {"model.embed_tokens": "embedding", "lm_head": "output head"}


def test_a_mixture_of_experts():
    found = split(mixtral())
    routers = {f"model.layers.{i}.mlp.gate": "router" for i in range(2)}
    assert found.protected == {"model.embed_tokens": "embedding", "lm_head": "output head", **routers}
    experts = {layer.name: layer for layer in found.layers if layer.kind == "expert"}
    assert len(experts) == 2 * 2 * 4
    assert experts["model.layers.1.mlp.experts.gate_up_proj[3]"] == Layer(
        "model.layers.1.mlp.experts.gate_up_proj[3]",
        "model.layers.1.mlp.experts.gate_up_proj",
        (32, 8),
        "expert",
        index=3,
    )


def test_transposed_linear_layers():
    found = split(gpt2())
    assert all(layer.transposed for layer in found.layers)
    assert {layer.name.rpartition("h.0.")[2]: layer.shape for layer in found.layers[:4]} == {
        "attn.c_attn": (24, 8),
        "attn.c_proj": (8, 8),
        "mlp.c_fc": (32, 8),
        "mlp.c_proj": (8, 32),
    }
    assert found.protected == {
        "transformer.wte": "output head, tied to the embedding",
        "transformer.wpe": "embedding",
    }


def test_a_convolutional_net_without_blocks():
    found = split(Cnn())
    assert {layer.name: (layer.shape, layer.groups) for layer in found.layers} == {
        "pointwise": ((16, 8), 1),
        "grouped": ((12, 24), 4),
        "hidden": ((6, 12), 1),
    }
    assert found.protected == {
        "stem": "stem: the first convolution",
        "depthwise": "depthwise convolution: few weights, each of them alone in its channel",
        "up": "transposed convolution: not supported",
        "classifier": "classifier: the last linear layer",
    }


def test_a_convolutional_net_with_blocks():
    found = split(ResNet())
    assert names(found) == ["stage.0.one", "stage.0.two", "stage.1.one", "stage.1.two"]
    assert found.protected == dict.fromkeys(("conv", "fc"), "outside the repeated blocks")


def test_a_perceptron_is_pruned_whole():
    assert names(split(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))) == ["0", "2"]


def test_a_router_beside_its_experts():
    found = split(Mixture())
    assert found.protected == {"route": "router"}
    assert names(found) == ["experts.0", "experts.1", "experts.2", "mix"]


def test_one_of_each_kind():
    found = split(Odd())
    assert names(found) == [
        "fused.in_proj_weight",
        "fused.out_proj",
        "apart.q_proj_weight",
        "apart.k_proj_weight",
        "apart.v_proj_weight",
        "apart.out_proj",
    ]
    assert {name: reason.split(":")[0].split(" ")[0] for name, reason in found.protected.items()} == {
        "table": "embedding",
        "lstm.weight_ih_l0": "recurrent",
        "lstm.weight_hh_l0": "recurrent",
        "score": "gate",
        "normed.parametrizations.weight.original0": "part",
        "normed.parametrizations.weight.original1": "part",
        "scale": "a",
    }


@pytest.mark.parametrize("make", [llama, mixtral, gpt2, Cnn, ResNet, Mixture, Odd])
def test_every_matrix_is_on_one_side(make):
    model = make()
    found = split(model)
    assert len(set(names(found))) == len(found.layers)
    assert not set(names(found)) & set(found.protected)
    every = {layer.name: id(model.get_parameter(layer.parameter)) for layer, _ in all_layers(model)}
    listed = {*names(found), *found.protected}
    assert listed <= set(every)
    assert {every[name] for name in listed} == set(every.values())
    for layer in found.layers:
        assert layer.matrix(model.get_parameter(layer.parameter)).shape == layer.shape
    matrices = {id(p) for p in model.parameters() if p.ndim == 2 and p.is_floating_point()}
    assert matrices <= set(every.values())


def test_tied_parameters_are_listed_once():
    model = nn.Module()
    model.a, model.b = nn.Linear(4, 4), nn.Linear(4, 4)
    model.b.weight = model.a.weight
    model.same = model.a
    model.one, model.two = Stack(), Stack()
    model.two.up_proj, model.two.down_proj = model.one.up_proj, model.one.down_proj
    assert names(split(model)) == ["a", *(f"one.{kind}_proj[{i}]" for kind in ("up", "down") for i in range(3))]


# What a layer's matrix is: the one that its inputs are multiplied with.


def applied(layer: Layer, model: nn.Module, x: Tensor) -> Tensor:
    return x @ layer.matrix(model.get_parameter(layer.parameter)).t()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_matrix_maps_inputs_to_outputs(make):
    model = make()
    for layer in split(model).layers:
        x, module = noise(5, layer.shape[1], seed=1), model.get_submodule(layer.name)
        bias = 0 if getattr(module, "bias", None) is None else module.bias
        torch.testing.assert_close(module(x) - bias, applied(layer, model, x))


def test_the_matrix_of_a_grouped_convolution():
    model = Cnn()
    layer = next(layer for layer in split(model).layers if layer.name == "grouped")
    x = noise(2, 16, 3, 2, seed=0)  # one place
    expected = (model.grouped(x) - model.grouped.bias[:, None, None]).flatten(1)
    rows = layer.matrix(model.grouped.weight).reshape(4, 3, 24)
    found = torch.einsum("goi,ngi->ngo", rows, x.reshape(2, 4, 24)).flatten(1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("make", [llama, mixtral, gpt2, Cnn])
def test_the_matrix_is_a_view(make):
    model = make()
    for layer in split(model).layers:
        parameter = model.get_parameter(layer.parameter).data
        layer.matrix(parameter).zero_()
        part = parameter if layer.index is None else parameter[layer.index]
        assert not bool(part.any())


# Globs.


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("model.layers.0.mlp.down_proj", "*.down_proj", True),
        ("model.layers.0.mlp.down_proj", "model.layers.0.*", True),
        ("model.layers.10.mlp.down_proj", "model.layers.1.*", False),
        ("model.layers.0.mlp.down_proj", "down_proj", False),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj", True),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj.weight", True),
        ("model.layers.0.mlp.down_proj", "*.DOWN_proj", False),
        ("model.layers.0.mlp.down_proj", "model.layers.[01].*", True),
        ("model.layers.2.mlp.down_proj", "model.layers.[01].*", False),
        ("experts.up[3]", "experts.up[3]", True),
        ("experts.up[3]", "*.up[3]", True),
        ("experts.up[13]", "*.up[3]", False),
        ("experts.up[3]", "*.up[2]", False),
        ("experts.up[3]", "*.up", True),
        ("experts.up[3]", "experts.up.weight", True),
        ("experts.up[3]", "experts.*", True),
        ("features.3", "features.[34]", True),
    ],
)
def test_globs(name: str, pattern: str, expected: bool):
    assert matches(name, [pattern]) == expected
    assert matches(name, ["nothing", pattern]) == expected
    assert not matches(name, [])


def test_protect_and_include():
    found = split(llama(), protect=["*.layers.0.*", "*.o_proj"], include=["lm_head"])
    assert "lm_head" in names(found)
    assert not any(".layers.0." in name or name.endswith("o_proj") for name in names(found))
    assert found.protected["model.layers.1.self_attn.o_proj"] == "protected by the recipe"
    assert found.protected["model.embed_tokens"] == "embedding"


def test_protect_wins_over_include():
    found = split(llama(), protect=["lm_*"], include=["lm_head"])
    assert found.protected["lm_head"] == "protected by the recipe"


def test_a_single_expert_by_its_name():
    found = split(mixtral(), protect=["model.layers.0.mlp.experts.down_proj[2]"])
    assert [name for name, why in found.protected.items() if "recipe" in why] == [
        "model.layers.0.mlp.experts.down_proj[2]"
    ]


@pytest.mark.parametrize("side", ["protect", "include"])
def test_a_glob_that_matches_nothing_is_an_error_with_names(side: str):
    with pytest.raises(SecateurError, match=r"'\*.q_porj' matches no layer(.|\n)*model.layers.0.self_attn.q_proj"):
        split(llama(), **{side: ["*.q_porj"]})
