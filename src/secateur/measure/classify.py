"""What an image classifier lost: its answers on the same images, paired with the dense model's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data import call
from secateur.errors import SecateurError
from secateur.probe import answer

NORMAL = 1.96  # 95 % of a normal distribution lies within so many standard deviations


@dataclass(frozen=True)
class Share:
    """A share of images, and its 95 % interval. Wilson 1927, eq. 1."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, right: int, count: int) -> Share:
        """right of count."""
        p, z2 = right / count, NORMAL**2
        middle = (p + z2 / (2 * count)) / (1 + z2 / count)
        half = NORMAL * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
        return cls(p, min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half)))


@dataclass(frozen=True)
class Answers:
    """Logits of a model [n, classes] and the labels [n], on the CPU."""

    logits: Tensor
    labels: Tensor

    def within(self, count: int) -> Tensor:
        """Whether the label is among the first `count` answers [n]."""
        return (self.logits.topk(min(count, self.logits.shape[1]), 1).indices == self.labels[:, None]).any(1)

    @property
    def top1(self) -> Share:
        """Share of images whose first answer is right."""
        return Share.of(int(self.within(1).sum()), len(self.labels))

    @property
    def top5(self) -> Share:
        """Share of images whose label is among the first five."""
        return Share.of(int(self.within(5).sum()), len(self.labels))

    def per_class(self) -> Tensor:
        """Accuracy of each class [classes]; NaN where there is no image."""
        classes = self.logits.shape[1]
        count = torch.bincount(self.labels, minlength=classes).double()
        right = torch.bincount(self.labels[self.within(1)], minlength=classes).double()
        return right / count


@dataclass(frozen=True)
class Loss:
    """What a pruned model lost against the dense one, on the same images.

    drop: of top-1, in 0..1; noise: half of the drop's 95 % interval, from the images on which just one of them is right;
    flips: share of first answers that changed; kl: mean KL(dense || pruned) in nats; class_drops: [classes], NaN without
    images. worst_class: the one that surely lost most, and worst_sure how much at least: its drop less a noise that no
    class of as many exceeds by chance but 1 time in 40.
    """

    drop: float
    noise: float
    flips: float
    kl: float
    worst_class: int
    worst_sure: float
    class_drops: tuple[float, ...]


class NotFinite(SecateurError):
    """A model whose answers are no numbers."""


def answers(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Answers:
    """Of a model on (inputs, labels), in eval mode. Raises SecateurError where labels are not those of its classes, and
    NotFinite where an answer is no number.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    logits, labels = [], []
    try:
        with torch.no_grad():
            for x, y in batches:
                found = answer(call(model, x)).float()
                if not logits:
                    check_labels(found, y)
                logits.append(found.cpu())
                labels.append(y.cpu())
    finally:
        for module, mode in modes:
            module.training = mode
    given = Answers(torch.cat(logits), torch.cat(labels))
    check_labels(given.logits, given.labels)
    if not bool(torch.isfinite(given.logits).all()):
        raise NotFinite("the model answers with NaN or infinity on these images")
    return given


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raises SecateurError unless there is one class for each of these logits [n, classes]."""
    if logits.ndim != 2 or logits.shape[0] != len(labels) or labels.ndim != 1:
        raise SecateurError(
            f"the model gives {list(logits.shape)} for labels {list(labels.shape)}; expected one row of logits an image"
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise SecateurError(
            f"labels are {int(labels.min())} to {int(labels.max())}; the model has {logits.shape[1]} classes, 0 to "
            f"{logits.shape[1] - 1}: the data is another model's, or its classes are numbered otherwise"
        )


def lost(dense: Answers, pruned: Answers) -> Loss:
    """Paired: the noise of a difference of two models on the same images is much less than that of each. Agresti & Min
    2005: half an image more in each cell, so that few images never look certain.
    """
    count = len(dense.labels)
    before, after = dense.within(1), pruned.within(1)
    worse, better = int((before & ~after).sum()), int((~before & after).sum())
    drop = (worse - better) / count
    noise = NORMAL * math.sqrt(worse + better + 1 - (worse - better) ** 2 / (count + 2)) / (count + 2)
    kl = F.kl_div(pruned.logits.log_softmax(1), dense.logits.log_softmax(1), reduction="none", log_target=True).sum(1)
    flips = (dense.logits.argmax(1) != pruned.logits.argmax(1)).float().mean()
    drops, sure = _per_class(dense, before, after)
    worst = int(sure.argmax())
    return Loss(
        drop,
        noise,
        float(flips),
        float(kl.mean().clamp(min=0)),
        worst,
        float(sure[worst]),
        tuple(drops.tolist()),
    )


def _per_class(dense: Answers, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Drop of every class, and what it is at least, with Bonferroni's correction; -inf for classes without images."""
    classes = dense.logits.shape[1]
    many = NormalDist().inv_cdf(1 - 0.025 / (2 * classes))

    def per_class(which: Tensor) -> Tensor:
        return torch.bincount(dense.labels[which], minlength=classes).double()

    count = torch.bincount(dense.labels, minlength=classes).double()
    worse, better = per_class(before & ~after), per_class(~before & after)
    drops = (worse - better) / count
    sure = _wilson(worse, count, many)[0] - _wilson(better, count, many)[1]
    return drops, torch.where(count > 0, sure, -torch.inf)


def _wilson(right: Tensor, count: Tensor, z: float) -> tuple[Tensor, Tensor]:
    """The ends of Wilson's interval, at z standard deviations."""
    p = right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z * (p * (1 - p) / count + z * z / (4 * count**2)).sqrt() / (1 + z * z / count)
    return middle - half, middle + half


def as_dict(given: Answers, against: Loss | None = None) -> dict[str, Any]:
    """For JSON."""
    found: dict[str, Any] = {"top1": given.top1.value, "top1_low": given.top1.low, "top1_high": given.top1.high}
    found |= {"top5": given.top5.value, "top5_low": given.top5.low, "top5_high": given.top5.high}
    found |= {"images": len(given.labels), "classes": given.logits.shape[1]}
    if against is not None:
        found |= {"drop": against.drop, "noise": against.noise, "flips": against.flips, "kl": against.kl}
        found |= {"worst_class": against.worst_class, "worst_sure": against.worst_sure}
        found |= {"class_drops": [None if math.isnan(drop) else drop for drop in against.class_drops]}
    return found
