"""A singular Gram matrix never ends a run: damping rises by itself, and the notes name the layer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import batches, save_llama
from secateur import method, prune

METHODS = ("sparsegpt", "admm", "wanda-refit", "obs")  # all that read a Gram matrix
Weights = dict[str, Tensor]


def few_tokens(weights: Weights) -> int:
    return 1


def constant_inputs(weights: Weights) -> int:
    """Every token is the same."""
    weights["model.embed_tokens.weight"][:] = weights["model.embed_tokens.weight"][0]
    return 8


def dead_inputs(weights: Weights) -> int:
    for name, weight in weights.items():
        if name.endswith("layernorm.weight"):
            weight[2:5] = 0
    return 8


def nothing_but_dead_inputs(weights: Weights) -> int:
    for name, weight in weights.items():
        if name.endswith("layernorm.weight"):
            weight[:] = 0
    return 8


def duplicated_inputs(weights: Weights) -> int:
    weights["model.embed_tokens.weight"][:, 4:] = weights["model.embed_tokens.weight"][:, :4]
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[4:] = weight[:4]
    return 8


def tiny_inputs(weights: Weights) -> int:
    """Their squares are zero, or nearly so, in float32."""
    for name, weight in weights.items():
        if name.endswith("layernorm.weight"):
            weight *= 1e-20
    return 8


def inputs_of_all_sizes(weights: Weights) -> int:
    for name, weight in weights.items():
        if name.endswith("layernorm.weight"):
            weight *= 10.0 ** torch.arange(-12, 12, 3)
    return 8


DEGENERATE = [
    few_tokens,
    constant_inputs,
    dead_inputs,
    nothing_but_dead_inputs,
    duplicated_inputs,
    tiny_inputs,
    inputs_of_all_sizes,
]


@pytest.mark.parametrize("degenerate", DEGENERATE)
@pytest.mark.parametrize("name", METHODS)
def test_a_singular_gram_matrix_ends_no_run(name: str, degenerate: Callable[[Weights], int], tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "source", layers=1 + (name == "obs"), shards=False)
    weights = load_file(folder / "model.safetensors")
    length = degenerate(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = prune(folder, method(name, sparsity=0.5, damp=1e-12), batches(1, length), tmp_path / "out")
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    for layer in report.layers:
        weight = pruned[f"{layer.name}.weight"]
        assert torch.isfinite(weight).all()
        assert int((weight == 0).sum()) >= weight.numel() // 2
    details = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert details["notes"] == report.notes
    assert all(note in (tmp_path / "out" / "README.md").read_text() for note in report.notes)
    if name in ("sparsegpt", "admm") and degenerate in (few_tokens, constant_inputs, duplicated_inputs):
        assert any("model.layers.0.self_attn.q_proj: " in note and "damping" in note for note in report.notes)


def test_a_good_gram_matrix_raises_no_damping(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "source", shards=False)
    report = prune(folder, method("sparsegpt", sparsity=0.5), batches(4, 32), tmp_path / "out")
    assert report.notes == []
