"""`prune_` and `prune` on what is out of the ordinary: memory layouts, precisions, matrices used both ways, losses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PatchTSTConfig,
    PatchTSTForPrediction,
    T5Config,
    T5ForConditionalGeneration,
)

from conftest import save_llama
from problems import noise
from secateur import SecateurError, method, prune, prune_
from secateur.forward import default_loss
from secateur.module import prune_built

HALF = {"sparsity": 0.5}


def zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())


def test_weights_in_channels_last_memory():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    report = prune_(model, method("wanda", **HALF), [noise(2, 3, 7, 7, seed=0)])
    pruned = [layer for layer in report.layers if layer.name in "12"]
    assert (
        [zeros(model[int(layer.name)].weight) for layer in pruned] == [layer.removed for layer in pruned] == [144, 288]
    )


def test_weights_that_stay_keep_their_precision():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune_(model, method("magnitude", **HALF))
    for name, value in model.state_dict().items():
        assert torch.equal(value, torch.where(value == 0, 0, before[name]))


def test_a_dtype_that_would_round_the_weights_is_an_error(tmp_path: Path):
    folder = save_llama(tmp_path / "model")
    with pytest.raises(SecateurError, match="would round the weights"):
        prune(folder, method("magnitude", dtype="bfloat16", **HALF), None, tmp_path / "out")


def test_modes_of_submodules_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    model[1].eval()
    prune_(model, method("wanda", **HALF), [noise(6, 4, seed=0)])
    assert [module.training for module in model.modules()] == [True, True, False, True]


class Both(nn.Module):
    """A matrix that is used as it is and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.other(self.code(x)), self.code.weight.t())


def test_a_matrix_used_both_ways_is_pruned_by_its_weights_alone():
    model = Both()
    expected = model.code.weight.abs().flatten().argsort(stable=True)[:32]
    report = prune_(model, method("sparsegpt", **HALF), [noise(20, 8, seed=0)])
    assert report.notes == ["code: saw no calibration tokens: pruned by its weights alone"]
    assert zeros(model.code.weight.flatten()[expected]) == 32


class Experts(nn.Module):
    """Stacked matrices [experts, in, out], which only their use tells from [experts, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(noise(2, 6, 8, seed=0))

    def forward(self, x: Tensor) -> Tensor:
        return sum((x @ expert for expert in self.experts), torch.zeros(()))


def test_a_pattern_is_checked_again_once_the_orientation_is_known():
    model = Experts()
    before = model.experts.detach().clone()
    with pytest.raises(SecateurError, match=r"used as \[8, 6\]; pattern 2:4 needs a multiple of 4 inputs"):
        prune_(model, method("wanda", granularity="2:4", include=["experts*"]), [noise(5, 6, seed=1)])
    assert torch.equal(model.experts, before)


# Losses


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=20, decoder_start_token_id=0, **sizes)).eval()


def test_an_encoder_decoder_learns_to_foretell_not_to_copy():
    model = t5()
    ids = torch.randint(1, 20, (1, 7), generator=torch.Generator().manual_seed(0))
    found = default_loss(model)(model, {"input_ids": ids, "decoder_input_ids": ids})
    shifted = torch.cat([torch.zeros(1, 1, dtype=torch.long), ids[:, :-1]], dim=1)
    logits = model(input_ids=ids, decoder_input_ids=shifted).logits
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits[0], ids[0]))


def test_a_classifier_without_labels_is_an_error():
    config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertForSequenceClassification(config)
    with pytest.raises(SecateurError, match="give batches with labels"):
        prune_(model, method("taylor", **HALF), [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])


def test_a_loss_that_fails_on_a_batch_is_one_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(*batch.values()), torch.zeros(99, dtype=torch.long))

    with pytest.raises(SecateurError, match="does not run on a batch"):
        prune_(model, method("fisher", **HALF), [noise(3, 4, seed=0)], loss=loss)


# Folders


def test_a_single_file_comes_before_an_index_as_in_stock_libraries(tmp_path: Path):
    folder = save_llama(tmp_path / "model", tied=False)
    new = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        new.model.layers[0].mlp.up_proj.weight.mul_(2)
    save_file(
        {name: value.contiguous() for name, value in new.state_dict().items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    prune(folder, method("magnitude", **HALF), None, tmp_path / "out")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj.weight
    expected = new.model.layers[0].mlp.up_proj.weight
    assert torch.equal(found, torch.where(found == 0, 0, expected))
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


def test_files_in_subfolders_come_along(tmp_path: Path):
    folder = save_llama(tmp_path / "model")
    for name in ("1_Pooling/config.json", "onnx/model.onnx", ".cache/secret"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{}")
    prune(folder, method("magnitude", **HALF), None, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert "1_Pooling/config.json" in found
    assert not found & {"onnx/model.onnx", ".cache/secret"}


def test_a_model_whose_input_nobody_knows_is_not_called_compared(tmp_path: Path):
    config = PatchTSTConfig(
        num_input_channels=2, context_length=32, patch_length=8, patch_stride=8, d_model=16, num_hidden_layers=1,
        num_attention_heads=2, ffn_dim=16, prediction_length=8,
    )  # fmt: skip
    PatchTSTForPrediction(config).save_pretrained(tmp_path / "model")
    report = prune(tmp_path / "model", method("magnitude", **HALF), None, tmp_path / "out")
    assert report.verified["difference"] is None
    assert "zeros counted" in report.verified["how"]
    details = json.loads((tmp_path / "out/secateur.json").read_text())
    assert details["verified"] == report.verified
    again = PatchTSTForPrediction.from_pretrained(tmp_path / "out")
    assert {layer.name: zeros(again.get_submodule(layer.name).weight) for layer in report.layers} == {
        layer.name: layer.removed for layer in report.layers
    }


class Tied(nn.Module):
    """The file has the name that comes first in the alphabet, the module the one that was registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8, bias=False)
        self.key = nn.Linear(8, 8, bias=False)
        self.key.weight = self.query.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.key(torch.tanh(self.query(input)))


def test_a_tied_weight_is_rounded_as_its_other_name_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from safetensors.torch import save_model

    torch.manual_seed(0)
    save_model(Tied().half(), str(tmp_path / "tied.safetensors"))
    save_file({"input": noise(20, 8, seed=0)}, tmp_path / "inputs.safetensors")
    (tmp_path / "tied_model.py").write_text("from test_prune import Tied\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = method("admm", calibration={"source": tmp_path / "inputs.safetensors", "samples": 20}, **HALF)
    report = prune_built("tied_model:Tied", tmp_path / "tied.safetensors", recipe, tmp_path / "out")
    assert report.sparsity == 0.5


def test_batches_as_the_model_itself_makes_its_loss():
    """Labels in a batch are used as they are."""
    model = t5()
    ids = torch.randint(1, 20, (1, 7), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids.flip(1)}
    torch.testing.assert_close(default_loss(model)(model, batch), model(**batch).loss)
