"""Architectures that have little in common, checked from folder to folder by benchmarks/families.py, which tries all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not (BENCHMARKS / "families.py").exists():
    pytest.skip("the benchmarks are not part of an installed package", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import families  # noqa: E402

CASES = [
    ("GPT-2", "sparsegpt", "2:4"),  # transposed weights, tied head, fused q k v
    ("Phi-3", "sparsegpt", "50 %"),  # fused, bfloat16
    ("OLMo 2", "wanda", "50 %"),  # two dtypes in one checkpoint
    ("Mixtral", "sparsegpt", "2:4"),  # stacked experts
    ("Qwen3-MoE", "wanda", "2:4"),  # experts kept apart on disk, a dense block among them
    ("Mamba", "sparsegpt", "50 %"),  # weights used without a call of their layer
    ("Zamba", "wanda", "50 %"),  # one block used at several places
    ("T5", "sparsegpt", "2:4"),  # encoder and decoder
    ("ALBERT", "sparsegpt", "50 %"),  # one block used by every layer
    ("ViT", "wanda", "2:4"),  # images
    ("ResNet", "sparsegpt", "50 %"),  # convolutions
    ("Swin", "magnitude", "2:4"),  # blocks of several widths
    ("Whisper", "wanda", "50 %"),  # sound
    ("Qwen2-VL", "sparsegpt", "50 %"),  # two towers, one after the other
    ("LLaVA, text alone", "wanda", "2:4"),  # a tower that sees nothing
]


@pytest.mark.parametrize(("name", "method", "pattern"), CASES, ids=[case[0] for case in CASES])
def test_family(name, method, pattern):
    row = families.examine(name, (method,), (pattern,))
    result = row["results"][f"{method} {pattern}"]
    assert result["problems"] == []
    assert result["layers"] > 0


def test_the_checks_see_a_wrong_result(tmp_path):
    """A result whose weights are not those of the model in memory is found."""
    family = families.families()["LLaMA"]
    families.save(family, tmp_path / "model")
    recipe = families.recipe_of(family, "wanda", "50 %")
    case = families.prune_both_ways(family, recipe, tmp_path / "model", tmp_path / "out")
    assert list(families.problems(case)) == []
    weight = case.after.get_parameter(case.job.plan.settings[0].layer.parameter)
    kept = weight.detach().nonzero()[0].tolist()
    weight.detach()[tuple(kept)] = 0
    found = list(families.problems(case))
    assert any("not exactly" in problem for problem in found)
    assert any("masks by streaming and in memory differ" in problem for problem in found)
    assert any("outputs" in problem for problem in found)
