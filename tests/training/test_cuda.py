"""What holds on a CPU holds on a GPU: mixed precision, fused optimizers, compiled models, resumed runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur
from secateur.recover import Settings, finetune_
from secateur.training import METHODS, Pruner
from secateur.training.at_init import synflow

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
RECIPE = secateur.method("magnitude", sparsity=0.8, protect=("4",))


def cuda_net() -> nn.Sequential:
    torch.manual_seed(0)
    parts = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    return nn.Sequential(*parts).cuda()


def cuda_data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)).cuda()
    return x, x[:, :4].argmax(1)


@pytest.mark.parametrize("method", list(METHODS))
def test_masks_hold_under_a_scaler_and_a_fused_optimizer(method):
    model = cuda_net()
    x, y = cuda_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    pruner = Pruner(model, RECIPE, optimizer, 20, method=method, every=2)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)  # so large that it skips steps at first
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert pruner.report().violations == 0
    assert 20 < pruner.step < 60  # some were skipped, and did not count
    assert pruner.report().sparsity == pytest.approx(0.8, abs=1e-3)


def test_masks_hold_in_a_compiled_model():
    model = cuda_net()
    x, y = cuda_data()
    compiled = torch.compile(model)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1, momentum=0.9, foreach=True)
    pruner = Pruner(compiled, RECIPE, optimizer, 20, every=2, end=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        assert pruner.report().violations == 0
    assert sum(int((model[i].weight == 0).sum()) for i in (0, 2)) == 2 * int(0.8 * 64 * 64)


class CudaBatches:
    def __len__(self) -> int:
        return 5

    def epoch(self, number: int):
        return [cuda_data()] * 5


def test_training_goes_on_to_the_last_bit(tmp_path):
    def train(model, epochs_left=None, resume=False):
        stop = {"at": epochs_left}

        def evaluate(_):
            if stop["at"] is not None:
                stop["at"] -= 1
                if stop["at"] < 0:
                    raise KeyboardInterrupt
            return {}

        settings = Settings(epochs=4, lr=0.1)
        return finetune_(
            model,
            CudaBatches(),
            settings,
            prune=lambda m, o, n: Pruner(m, RECIPE, o, n, method="rigl", every=2),
            evaluate=evaluate,
            folder=tmp_path / ("a" if epochs_left is None and not resume else "b"),
            resume=resume,
        )

    whole = cuda_net()
    train(whole)
    half = cuda_net()
    with pytest.raises(KeyboardInterrupt):
        train(half, epochs_left=2)
    again = cuda_net()
    train(again, resume=True)
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_weights_and_masks_of_one_shot_and_at_the_beginning():
    model = cuda_net()
    x, _ = cuda_data()
    report = secateur.prune_(model, secateur.method("admm", sparsity=0.7, protect=("4",)), [x])
    assert report.sparsity == pytest.approx(0.7, abs=1e-3)
    masks = synflow(cuda_net(), secateur.method("magnitude", sparsity=0.9, allocation="global"), x)
    assert masks.sparsity == pytest.approx(0.9, abs=1e-3)


def test_masks_of_a_model_that_was_moved_go_with_it():
    model = cuda_net().cpu()
    with torch.no_grad():
        model[0].weight.mul_(model[0].weight.abs() > 0.05)
    masks = secateur.training.Masks.of_zeros(model)
    model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, RECIPE, optimizer, 10, masks=masks, every=2)
    x, y = cuda_data()
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert not bool(model[0].weight.cpu()[~masks.keep["0.weight"]].any())
    assert pruner.report().violations == 0
