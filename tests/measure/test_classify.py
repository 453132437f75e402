"""Answers of a classifier, paired with the dense model's: against counts by hand and what scipy says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.errors import SecateurError
from secateur.measure.classify import Answers, Share, answers, lost


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_are_wilsons(pair):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    right, count = pair
    want = stats.binomtest(right, count).proportion_ci(method="wilson")
    found = Share.of(right, count)
    assert (found.low, found.high) == pytest.approx((want.low, want.high), abs=1e-4)


def given_answers(first: list[int], labels: list[int], classes: int = 3) -> Answers:
    return Answers(torch.nn.functional.one_hot(torch.tensor(first), classes).float() * 3, torch.tensor(labels))


def test_what_was_lost_is_counted_image_by_image():
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    dense = given_answers([0, 0, 0, 1, 1, 2, 2, 2, 0, 2], labels)  # 8 right
    pruned = given_answers(
        [0, 1, 1, 1, 1, 1, 2, 2, 1, 0], labels
    )  # loses 2 of class 0, wins 1 of class 1, loses 1 of 2
    found = lost(dense, pruned)
    assert found.drop == pytest.approx(0.2)
    assert found.flips == pytest.approx(0.5)
    assert found.class_drops == pytest.approx((2 / 3, -1 / 3, 1 / 4))
    assert found.noise == pytest.approx(1.96 * ((5 - 2**2 / 12) ** 0.5) / 12)


def test_kl_is_that_of_float64():
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(50, 7, generator=generator) * 3 for _ in range(2))
    labels = torch.zeros(50, dtype=torch.long)
    p, q = one.double().softmax(1), two.double().softmax(1)
    want = float((p * (p.log() - q.log())).sum(1).mean())
    assert lost(Answers(one, labels), Answers(two, labels)).kl == pytest.approx(want, rel=1e-5)


def test_the_same_answers_have_lost_nothing():
    one = Answers(torch.randn(40, 5), torch.arange(40) % 5)
    found = lost(one, one)
    assert (found.drop, found.flips, found.kl) == (0, 0, 0)
    assert found.noise == pytest.approx(1.96 / 42)  # as much as a single image


def test_noise_is_what_resampling_says():
    generator = torch.Generator().manual_seed(1)
    labels = torch.zeros(2000, dtype=torch.long)
    dense, pruned = ((torch.rand(2000, generator=generator) < p).long() for p in (0.1, 0.15))
    found = lost(*(Answers(nn.functional.one_hot(x, 2).float(), labels) for x in (dense, pruned)))
    difference = ((dense == 0).float() - (pruned == 0).float()).double()
    drawn = torch.randint(2000, (3000, 2000), generator=generator)
    assert found.noise == pytest.approx(1.96 * float(difference[drawn].mean(1).std()), rel=0.1)


def test_a_class_that_surely_loses_is_told_from_one_that_may():
    labels = torch.arange(4000) % 10
    logits = nn.functional.one_hot(labels, 10).float()
    broken = logits.clone()
    broken[(labels == 7).nonzero().flatten()[:100]] = 0.0  # a quarter of class 7
    broken[:, 0] += 0.01
    broken[(labels == 3).nonzero().flatten()[:1]] = 0.0  # one image of class 3
    broken[:, 0] += 0.01
    found = lost(Answers(logits, labels), Answers(broken, labels))
    assert found.worst_class == 7
    assert 0.15 < found.worst_sure < 0.25


def test_a_class_of_two_images_is_never_sure():
    labels = torch.arange(200) // 2
    logits = nn.functional.one_hot(labels, 100).float()
    broken = logits.clone()
    broken[14:16] = 0.0
    broken[14:16, 0] = 1.0
    assert lost(Answers(logits, labels), Answers(broken, labels)).worst_sure < 0.3


def test_five_answers_hold_the_label():
    logits = torch.arange(10.0).flip(0).repeat(10, 1)
    found = Answers(logits, torch.arange(10))
    assert found.top1.value == 0.1
    assert found.top5.value == 0.5


def test_labels_of_another_model_and_answers_that_are_no_numbers_are_refused():
    x = torch.randn(4, 6)
    with pytest.raises(SecateurError, match="labels are 0 to 3; the model has 3 classes"):
        answers(nn.Linear(6, 3), [(x, torch.arange(4))])
    broken = nn.Linear(6, 4)
    with torch.no_grad():
        broken.weight[0, 0] = torch.nan
    with pytest.raises(SecateurError, match="NaN"):
        answers(broken, [(x, torch.arange(4))])
    with pytest.raises(SecateurError, match="one row of logits"):
        answers(nn.Conv2d(1, 2, 1), [(torch.randn(2, 1, 3, 3), torch.arange(2))])


def test_asking_leaves_the_mode_as_it_was():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.9))
    x = torch.randn(8, 6)
    one, two = (answers(model, [(x, torch.zeros(8).long())]).logits for _ in range(2))
    assert torch.equal(one, two)
    assert model.training
