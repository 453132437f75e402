"""Fine-tuning: what a loop by hand gives, going on to the last bit, and what stops it."""

from __future__ import annotations

import errno
import json
import math

import pytest
import torch
from torch import nn

import secateur
from secateur import state
from secateur.data.images import Epochs, from_tensors
from secateur.errors import SecateurError
from secateur.recover import Settings, finetune, finetune_
from secateur.training import Pruner

X = torch.randn(96, 12, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
RECIPE = secateur.method("magnitude", sparsity=0.7, protect=("3",))


def tiny(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def epochs(size: int = 32) -> Epochs:
    return Epochs(from_tensors(X, Y, "points"), size, seed=5)


def gradual(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Pruner:
    return Pruner(model, secateur.method("magnitude", sparsity=0.7, protect=("3",)), optimizer, steps, every=2)


def test_a_plain_training_is_what_a_loop_by_hand_gives():
    one, other = tiny(), tiny()
    history = finetune_(one, epochs(), Settings(epochs=3, lr=0.1, weight_decay=0.01, decay="linear"))
    torch.manual_seed(0)
    groups = [
        {"params": [p for p in other.parameters() if p.ndim == d], "weight_decay": w} for d, w in ((2, 0.01), (1, 0))
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    other.train()
    losses = []
    for step, (x, y) in enumerate((x, y) for number in range(3) for x, y in epochs().epoch(number)):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 9)
        loss = nn.functional.cross_entropy(other(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert [e.loss for e in history] == pytest.approx([sum(losses[i : i + 3]) / 3 for i in (0, 3, 6)], rel=1e-6)


def test_learning_rates_warm_up_and_come_down():
    settings = Settings(lr=2.0, warmup=0.2)
    found = [finetune.rate(settings, p) for p in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert found == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0])


def test_a_teacher_is_matched_by_the_loss_of_the_paper():
    model, teacher = tiny().eval(), tiny(1)
    settings = Settings(distil=0.3, temperature=4.0)
    run = finetune._Run(model, torch.optim.SGD(model.parameters()), None, settings, 1, None, [])
    found = finetune._loss(run, (X, Y), X.device, teacher.eval(), check=True).detach()
    p, q = (m(X).detach().double() / 4 for m in (teacher, model))
    kl = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean()
    hard = nn.functional.cross_entropy(model(X).detach().double(), Y)
    assert float(found) == pytest.approx(float(0.7 * hard + 0.3 * 16 * kl), rel=1e-5)


def test_a_teacher_alone_teaches():
    teacher = tiny()
    finetune_(teacher, epochs(), Settings(epochs=20, lr=0.1))
    student = tiny(3)
    wrong = Epochs(from_tensors(X, Y.roll(1), "points"), 32)  # labels say nothing
    finetune_(student, wrong, Settings(epochs=30, lr=0.1, distil=1.0), teacher=teacher)
    assert float((student(X).argmax(1) == teacher(X).argmax(1)).float().mean()) > 0.9


class Stop(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("after", [1, 3])
def test_stopped_it_goes_on_to_the_last_bit(tmp_path, optimizer, after):
    settings = Settings(epochs=5, lr=0.05, optimizer=optimizer)
    whole, half, again = tiny(), tiny(), tiny(7)
    history = finetune_(whole, epochs(), settings, prune=gradual, folder=tmp_path / "whole")
    seen = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen.append(1)
        if len(seen) > after:
            raise Stop
        return {}

    with pytest.raises(Stop):
        finetune_(half, epochs(), settings, prune=gradual, folder=tmp_path / "half", evaluate=evaluate)
    torch.manual_seed(123)
    resumed = finetune_(again, epochs(), settings, prune=gradual, folder=tmp_path / "half", resume=True)
    assert [e.loss for e in resumed] == [e.loss for e in history]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    whole_log, half_log = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "half")
    )
    assert [row["loss"] for row in whole_log] == [row["loss"] for row in half_log]
    assert half_log[-1]["sparsity"] == pytest.approx(0.7, abs=0.01)


def test_resuming_what_is_done_trains_nothing(tmp_path):
    model = tiny()
    finetune_(model, epochs(), Settings(epochs=2), folder=tmp_path)
    again = tiny(3)
    assert len(finetune_(again, epochs(), Settings(epochs=2), folder=tmp_path, resume=True)) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_of_another_model_or_of_other_settings_is_refused(tmp_path):
    finetune_(tiny(), epochs(), Settings(epochs=1), folder=tmp_path)
    other = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(SecateurError, match="checkpoint of another model"):
        finetune_(other, epochs(), Settings(epochs=1), folder=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    with pytest.raises(SecateurError, match=r"other settings \(epochs, lr\)"):
        finetune_(tiny(), epochs(), Settings(epochs=2, lr=0.5), folder=tmp_path, resume=True)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"nothing")
    with pytest.raises(SecateurError, match="no checkpoint of fine-tuning"):
        finetune_(tiny(), epochs(), Settings(epochs=1), folder=tmp_path, resume=True)


def test_a_loss_that_is_no_number_stops_it_and_the_last_epoch_is_kept(tmp_path):
    class Poisoned:
        def __len__(self) -> int:
            return 3

        def epoch(self, number: int):
            for x, y in epochs().epoch(number):
                yield (x * math.nan if number == 2 else x), y

    model = tiny()
    with pytest.raises(SecateurError, match=r"the loss is nan in step 1 of epoch 3.* Epoch 2 is kept .*\n.*Lower lr"):
        finetune_(model, Poisoned(), Settings(epochs=4), folder=tmp_path)
    good = tiny(1)
    assert len(finetune_(good, epochs(), Settings(epochs=4), folder=tmp_path, resume=True)) == 4
    assert all(bool(torch.isfinite(p).all()) for p in good.parameters())


def test_a_full_disk_is_one_clear_error_and_what_was_there_stays(tmp_path, monkeypatch):
    real, calls = state.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(SecateurError, match=r"the disk is full.* make room and go on with resume"):
        finetune_(tiny(), epochs(), Settings(epochs=3), folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.safetensors", "log.jsonl"]
    assert len(finetune_(tiny(), epochs(), Settings(epochs=3), folder=tmp_path, resume=True)) == 3


def test_labels_of_another_model_are_refused_before_a_step_is_made():
    model = tiny()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(SecateurError, match="labels are 0 to 9; the model has 3 classes"):
        finetune_(model, Epochs(from_tensors(X, torch.arange(96) % 10, "points"), 96), Settings(epochs=1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(SecateurError, match="there is no teacher"):
        finetune_(tiny(), epochs(), Settings(distil=0.5))
    with pytest.raises(SecateurError, match="nothing to fine-tune"):
        finetune_(tiny().requires_grad_(False), epochs(), Settings())


def test_events_are_written_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = finetune_(tiny(), epochs(), Settings(epochs=3), folder=tmp_path, tensorboard=True, prune=gradual)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([e.loss for e in history])
    assert events.Scalars("sparsity")[-1].value == pytest.approx(0.7, abs=0.01)


def test_a_loader_of_torch_does_for_batches(tmp_path):
    """Resumed after an epoch it ends in the same bits: its order comes from the random state that is kept."""
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 16, shuffle=True)
    whole, half = tiny(), tiny()
    finetune_(whole, loader, Settings(epochs=3), folder=tmp_path / "whole")

    def stop(model) -> dict:
        if len(seen := list(tmp_path.glob("half/log.jsonl"))) and seen[0].read_text().count("\n") == 1:
            raise KeyboardInterrupt
        return {"one": torch.tensor(1.0)}

    with pytest.raises(KeyboardInterrupt):
        finetune_(half, loader, Settings(epochs=3), folder=tmp_path / "half", evaluate=stop)
    again = tiny()
    finetune_(again, loader, Settings(epochs=3), folder=tmp_path / "half", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_run_that_begins_anew_leaves_nothing_of_the_one_before(tmp_path):
    finetune_(tiny(), epochs(), Settings(epochs=1), folder=tmp_path)

    def stop(*_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune_(tiny(1), epochs(), Settings(epochs=1), folder=tmp_path, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_batches_teachers_and_checkpoints_that_do_not_fit_are_told(tmp_path):
    with pytest.raises(SecateurError, match="a mapping of x; expected"):
        finetune_(tiny(), [{"x": X}], Settings(epochs=1))
    other = torch.nn.Linear(X.shape[1], 9)
    with pytest.raises(SecateurError, match="they have other classes"):
        finetune_(tiny(), epochs(), Settings(epochs=1, distil=0.5), teacher=other)

    def prune(model, optimizer, steps):
        return Pruner(model, secateur.method("magnitude", sparsity=0.5), optimizer, steps)

    finetune_(tiny(), epochs(), Settings(epochs=1), folder=tmp_path, prune=prune)
    with pytest.raises(SecateurError, match="was made with masks, and here are none"):
        finetune_(tiny(), epochs(), Settings(epochs=1), folder=tmp_path, resume=True)


def test_weights_that_overflow_under_masks_are_a_training_that_diverged():
    def prune(model, optimizer, steps):
        return Pruner(model, secateur.method("magnitude", sparsity=0.5), optimizer, steps, every=1)

    with pytest.raises(finetune.Diverged, match="the loss is nan in step"):
        finetune_(tiny(), epochs(), Settings(epochs=3, lr=1e30), prune=prune)


def test_labels_are_looked_at_in_every_batch():
    wrong = Y.clone()
    wrong[90] = 3
    with pytest.raises(SecateurError, match="labels are 0 to 3; the model has 3 classes"):
        finetune_(tiny(), [(X[:32], Y[:32]), (X[32:64], Y[32:64]), (X[64:], wrong[64:])], Settings(epochs=1))


def test_an_epoch_without_steps_is_told():
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=200, drop_last=True)
    with pytest.raises(SecateurError, match="an epoch has no steps"):
        finetune_(tiny(), loader, Settings(epochs=1))


def test_a_log_that_a_killed_run_did_not_write_is_written_when_it_goes_on(tmp_path, monkeypatch):
    finetune_(tiny(), epochs(), Settings(epochs=2), folder=tmp_path / "whole")

    def killed(run):
        if len(run.history) > 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(finetune, "_write_log", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune_(tiny(), epochs(), Settings(epochs=2), folder=tmp_path / "killed")
    finetune_(tiny(), epochs(), Settings(epochs=2), folder=tmp_path / "killed", resume=True)
    whole, other = ((tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "killed"))
    assert [json.loads(line)["loss"] for line in other] == [json.loads(line)["loss"] for line in whole]
    assert len(other) == 2


def test_events_of_somebody_else_stay(tmp_path):
    (tmp_path / "events.out.tfevents.1.mine").write_text("mine")
    finetune_(tiny(), epochs(), Settings(epochs=1), folder=tmp_path)
    assert (tmp_path / "events.out.tfevents.1.mine").read_text() == "mine"
