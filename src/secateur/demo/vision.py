"""Iterative pruning with rewinding on handwritten digits: LeNet-300-100, a random mask beside it, and a small dense net."""

from __future__ import annotations

import copy
import statistics
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data.images import Epochs, Images, from_tensors
from secateur.errors import SecateurError
from secateur.measure.classify import answers
from secateur.prune import Progress, no_progress
from secateur.recipe import method
from secateur.recover import Settings, finetune_
from secateur.strategy import pages
from secateur.training import Masks, Pruner, iterate_

SEEDS, TEST = 5, 597  # nets; images that are measured on, of 1,797
SPARSITY, KEEP = 0.96, 0.6
TRAINING = {"epochs": 20, "lr": 0.1, "batch": 60, "weight_decay": 1e-4}  # of every round
RECIPE = method("magnitude", sparsity=SPARSITY, allocation="lamp", include=("*",))
NAMES = {
    "pruned": "pruned in rounds, learning rate rewound",
    "dense": "dense",
    "small": "small dense, as many parameters",
    "random": "random mask, as many weights a layer",
}


@dataclass(frozen=True)
class Point:
    """A net of a seed after a round of training, which every kind has had equally often. See NAMES."""

    seed: int
    kind: str
    round: int
    sparsity: float
    weights: int
    accuracy: float


@dataclass(frozen=True)
class Lottery:
    """All nets, and the figure."""

    points: list[Point]
    figure: Path

    def values(self, kind: str, number: int | None = None) -> list[float]:
        """Accuracies of a kind by seed, after a round, by default the last."""
        last = max(p.round for p in self.points)
        wanted = last if number is None else number
        return [p.accuracy for p in sorted(self.points, key=lambda p: p.seed) if (p.kind, p.round) == (kind, wanted)]

    def ahead(self, kind: str) -> tuple[float, float]:
        """How much better the pruned nets are than those of a kind with the same seeds, and half of its 95 % interval."""
        return interval([a - b for a, b in zip(self.values("pruned"), self.values(kind), strict=True)])

    @property
    def sparsity(self) -> float:
        """That was reached."""
        return max(p.sparsity for p in self.points)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        ahead = {kind: self.ahead(kind) for kind in NAMES if kind != "pruned"}
        means = {kind: interval(self.values(kind)) for kind in NAMES}
        return {
            "sparsity": self.sparsity,
            "accuracy": means,
            "ahead_of": ahead,
            "figure": str(self.figure),
            "points": [asdict(p) for p in self.points],
        }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), STUDENT[min(len(values), len(STUDENT) - 1)] * spread / len(values) ** 0.5


STUDENT = (0.0, 0.0, 12.71, 4.30, 3.18, 2.78)  # t of 97.5 % by the number of nets


def lenet(seed: int, first: int = 300, second: int = 100) -> nn.Sequential:
    """LeNet-300-100 for 64 pixels. LeCun et al. 1998."""
    torch.manual_seed(seed)
    layers = [
        ("fc1", nn.Linear(64, first)),
        ("relu1", nn.ReLU()),
        ("fc2", nn.Linear(first, second)),
        ("relu2", nn.ReLU()),
        ("fc3", nn.Linear(second, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def digits() -> tuple[Images, Images]:
    """1,200 digits to train on and 597 to measure on, of scikit-learn's. Raises SecateurError where it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SecateurError("the digits come with scikit-learn: pip install 'secateur[vision]'") from None
    found: Any = load_digits()
    pixels = torch.from_numpy(found.data).float() / 8 - 1  # [1797, 64] in -1..1
    labels = torch.from_numpy(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:TEST], order[TEST:]
    return (
        from_tensors(pixels[train], labels[train], f"{len(train):,} digits"),
        from_tensors(pixels[test], labels[test], f"{TEST} other digits"),
    )


def demo_vision(out: Path, progress: Progress = no_progress, seeds: int = SEEDS) -> Lottery:
    """Train, prune and compare for every seed; out/lottery.png is the figure.

    Raises SecateurError when `out` exists, or a library is absent.
    """
    pages.check()
    if out.exists():
        raise SecateurError(f"{out} exists already: name a new folder, or delete it")
    train, test = digits()
    points: list[Point] = []
    for seed in range(seeds):
        points += _seed(seed, train, test, lambda what, done=seed: progress("seeds", done, seeds, what))
    progress("seeds", seeds, seeds, "done")
    out.mkdir(parents=True)
    found = Lottery(points, out / "lottery.png")
    _draw(found)
    return found


def _seed(seed: int, train: Images, test: Images, said: Callable[[str], None]) -> list[Point]:
    settings = Settings.model_validate({**TRAINING, "seed": seed})
    batches = Epochs(train, settings.batch, seed)
    points: list[Point] = []

    def fit(model: nn.Module, masks: Masks) -> None:
        def hold(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Pruner:
            return Pruner(model, RECIPE, optimizer, steps, method="static", masks=masks, end=0.0)

        finetune_(model, batches, settings, prune=hold if masks.keep else None)

    def note(kind: str, number: int, model: nn.Module, masks: Masks) -> None:
        weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        there = round((1 - masks.sparsity) * weights)
        points.append(Point(seed, kind, number, masks.sparsity, there, accuracy(model, test)))
        said(f"seed {seed}, {kind}, round {number}")

    none = Masks({})
    dense = lenet(seed)
    fit(dense, none)
    note("dense", 0, dense, none)
    pruned = copy.deepcopy(dense)
    note("pruned", 0, pruned, none)
    masks, rounds = none, 0
    for found in iterate_(pruned, RECIPE, fit, keep=KEEP, rewind="learning-rate"):
        fit(dense, none)
        masks, rounds = found.masks, found.number
        note("pruned", rounds, pruned, masks)
        note("dense", rounds, dense, none)
    drawn = _shuffled(masks, seed)
    others = {"random": (lenet(seed), drawn), "small": (lenet(seed, *_widths(points[-2].weights)), none)}
    for kind, (model, held) in others.items():
        held.apply_(model)
        for number in range(rounds + 1):
            fit(model, held)
            note(kind, number, model, held)
    return points


def accuracy(model: nn.Module, test: Images) -> float:
    """Share of the test digits that are told."""
    return answers(model, test.batches(TEST)).top1.value


def _shuffled(masks: Masks, seed: int) -> Masks:
    """As many weights in every layer, anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def mixed(keep: Tensor) -> Tensor:
        return keep.flatten()[torch.randperm(keep.numel(), generator=generator)].reshape(keep.shape)

    return Masks({name: mixed(keep) for name, keep in masks.keep.items()})


def _widths(weights: int) -> tuple[int, int]:
    """Widths a and b, three to one, so that 64 a + a b + 10 b is at least `weights`."""
    second = 1
    while 64 * 3 * second + 3 * second**2 + 10 * second < weights:
        second += 1
    first = max(1, -(-(weights - 10 * second) // (64 + second)))
    return first, second


def _draw(found: Lottery) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.subplots()
    rounds = sorted({p.round for p in found.points})
    left = {p.round: 100 * (1 - p.sparsity) for p in found.points if p.kind == "pruned"}
    colours = (pages.COLOURS[0], "black", pages.COLOURS[2], pages.COLOURS[1])
    for colour, (kind, label) in zip(colours, NAMES.items(), strict=True):
        shown = [interval(found.values(kind, number)) for number in rounds]
        means, noise = [100 * m for m, _ in shown], [100 * n for _, n in shown]
        line = "--" if kind == "dense" else "-"
        axes.errorbar(
            rounds, means, noise, marker="o", linestyle=line, color=colour, label=label, capsize=2, markersize=4
        )
    axes.set_xticks(rounds, [f"{left[number]:.0f}" for number in rounds])
    axes.set_xlabel("weights left of the pruned net after each round, %; all nets have been trained equally often")
    axes.set_ylabel(f"accuracy on {TEST} digits, %")
    low = min(min(found.values(kind, n)) for kind in ("pruned", "dense", "small") for n in rounds)
    axes.set_ylim(100 * low - 1.5, 100)
    axes.set_title("LeNet-300-100, means over seeds with 95 % intervals", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(found.figure, dpi=130)
