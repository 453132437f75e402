"""The digits demo: what is compared is comparable."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.demo import vision
from secateur.errors import SecateurError

pytest.importorskip("sklearn", reason="scikit-learn is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")


@given(st.integers(100, 50000))
def test_a_small_net_has_at_least_as_many_weights_and_hardly_more(weights):
    first, second = vision._widths(weights)
    have = 64 * first + first * second + 10 * second
    assert weights <= have <= weights + 64 + second


def test_digits_are_split_and_nothing_is_in_both():
    train, test = vision.digits()
    assert len(train) + len(test) == 1797
    rows = torch.cat([train.read(range(len(train))), test.read(range(len(test)))])
    assert len(rows.unique(dim=0)) == len(rows)


def test_every_kind_is_trained_equally_and_has_as_many_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(vision, "TRAINING", {**vision.TRAINING, "epochs": 2})
    fits: list[int] = []
    real = vision.finetune_
    monkeypatch.setattr(
        vision, "finetune_", lambda model, *args, **more: fits.append(id(model)) or real(model, *args, **more)
    )
    found = vision.demo_vision(tmp_path / "out", seeds=1)
    rounds = max(p.round for p in found.points)
    assert sorted(fits.count(model) for model in set(fits)) == [rounds, rounds + 1, rounds + 1, rounds + 1]
    last = {p.kind: p for p in found.points if p.round == rounds}
    assert last["pruned"].sparsity == pytest.approx(0.96, abs=1e-3)
    assert last["random"].weights == last["pruned"].weights == round(0.04 * 50200)
    assert last["pruned"].weights <= last["small"].weights <= 1.1 * last["pruned"].weights
    assert last["dense"].weights == 50200
    assert (tmp_path / "out/lottery.png").stat().st_size > 10000
    with pytest.raises(SecateurError, match="exists already"):
        vision.demo_vision(tmp_path / "out", seeds=1)


def test_intervals_are_students():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = [0.98, 0.97, 0.99, 0.985, 0.978]
    mean, half = vision.interval(values)
    want = stats.t.interval(0.95, 4, loc=mean, scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx(want, abs=2e-5)
