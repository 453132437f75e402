"""The Hugging Face Trainer: masks hold, and a resumed run ends as one that was not interrupted."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import secateur
from secateur.errors import SecateurError
from secateur.training.callback import MASKS, PrunerCallback

X = torch.randn(64, 20, generator=torch.Generator().manual_seed(1))


class Rows(Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": X[index], "labels": X[index, :4].argmax()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU())
        self.head = nn.Linear(20, 4)

    def forward(self, x, labels=None):
        logits = self.head(self.body(x))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def trainer(folder, criterion: str = "magnitude", method: str = "rigl", **more) -> tuple[Trainer, PrunerCallback]:
    callback = PrunerCallback(secateur.method(criterion, sparsity=0.8, protect=("head",)), method=method, every=3)
    args = TrainingArguments(
        folder, per_device_train_batch_size=16, max_steps=24, save_steps=8, logging_steps=4, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, use_cpu=True, **more,
    )  # fmt: skip
    return Trainer(Net(), args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback]), callback


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_masks_hold_and_a_resumed_run_ends_in_the_same_bits(criterion, tmp_path):
    """With random masks of step 0 the weights of the checkpoint would be lost."""
    whole, callback = trainer(tmp_path, criterion)
    whole.train()
    assert callback.pruner is not None
    report = callback.pruner.report()
    assert (report.step, report.violations) == (24, 0)
    assert report.sparsity == pytest.approx(0.8)
    assert [round(entry["sparsity"], 3) for entry in whole.state.log_history if "sparsity" in entry][-1] == 0.8
    assert (tmp_path / "checkpoint-8" / MASKS).is_file()
    resumed, again = trainer(tmp_path, criterion)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.pruner is not None
    assert again.pruner.masks.digest() == callback.pruner.masks.digest()
    assert again.pruner.report().refreshes == report.refreshes
    for one, two in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_without_masks_is_one_clear_error(tmp_path):
    whole, _ = trainer(tmp_path)
    whole.train()
    (tmp_path / "checkpoint-8" / MASKS).unlink()
    resumed, _ = trainer(tmp_path)
    with pytest.raises(SecateurError, match=r"checkpoint-8.* is not there. Say where its checkpoint is"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_the_masks_are_those_of_the_best_checkpoint_where_that_is_loaded(tmp_path):
    """The best one here is that of the largest loss, so that it is the first; fewer weights were gone then."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    whole, callback = trainer(tmp_path, method="gradual", eval_strategy="steps", eval_steps=8, **best)
    whole.train()
    assert whole.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    saved = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    pruner = callback.pruner
    assert pruner is not None
    assert sorted(pruner.masks.keep) == ["body.0.weight", "body.2.weight"]
    for name, keep in pruner.masks.keep.items():
        assert torch.equal(keep, saved[name] != 0)
        assert torch.equal(whole.model.get_parameter(name), saved[name])
    closed = 0.8 * (1 - (1 - 6 / 18) ** 3)  # at the last choice before it
    assert pruner.report().sparsity == pytest.approx(closed, abs=1 / 400)
    assert pruner.report().violations == 0
