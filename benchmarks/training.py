"""Pruning in one shot, while training, and gradually, on CIFAR-10: always beside the dense model trained equally.

    python benchmarks/training.py --parts oneshot overhead          # a CPU does
    python benchmarks/training.py --parts methods gradual --device cuda

Rows go to results/training.jsonl as they come; what is there is not done again. --shard 0/4: a quarter of the cells.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import secateur
from common import RESULTS, ROOT, SHARED, append, machine, rows
from secateur.data.images import Epochs, Images, from_tensors, load_images
from secateur.recover import Settings, finetune_, reestimate_
from secateur.training import METHODS, Pruner
from secateur.training.masks import Masks
from vision import CifarResNet, fetch

OUT = RESULTS / "training.jsonl"
ENDS = ("conv1", "linear")  # the first and the last layer stay, as in the published tables
SEEDS = (0, 1, 2)


@cache
def cifar(part: str, device: str) -> Images:
    """CIFAR-10, its pixels on the device."""
    fetch("pillow==12.0.0", "PIL")
    found = load_images(SHARED / f"data/cifar10/{part}.npz")
    return from_tensors(found.read(range(len(found))).to(device), found.labels, found.description)


def resnet(depth: int, device: str) -> nn.Module:
    """The public checkpoint."""
    model = CifarResNet(depth)
    model.load_state_dict(load_file(SHARED / f"models/resnet{depth}.safetensors"))
    return model.to(device).eval()


@torch.no_grad()
def accuracy(model: nn.Module, device: str) -> float:
    """Top-1 on the 10,000 test images, in per cent."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in cifar("test", device).batches(500, device))
    return right / 100


# The cells


def oneshot() -> Iterator[dict[str, Any]]:
    """One shot, no retraining: ResNet-20's 17 block convolutions."""
    yield {"name": "dense", "sparsity": 0.0}
    for sparsity in (0.5, 0.6, 0.7, 0.8, 0.9):
        for name in ("magnitude", "global-magnitude", "sparsegpt", "admm", "admm-lamp", "stages", "stages-lamp"):
            yield {"name": name, "sparsity": sparsity}


def methods() -> Iterator[dict[str, Any]]:
    """ResNet-20 at 90 %, three epochs from the dense checkpoint."""
    for name, seed in itertools.product(("dense", *METHODS, "random"), SEEDS):
        yield {"name": name, "sparsity": 0.0 if name == "dense" else 0.9, "seed": seed, "epochs": 3}


def gradual() -> Iterator[dict[str, Any]]:
    """ResNet-56, gradually; with the dense checkpoint as a teacher of the dense net too, and without one. solved: cut and
    solved for in stages before training, which then has all of its epochs with the masks that stay.
    """
    for sparsity in (0.95, 0.9):
        yield {"name": "solved", "sparsity": sparsity, "seed": 0, "epochs": EPOCHS, "distil": 0.7}
    for distil, sparsity in itertools.product((0.7, 0.0), (0.0, 0.8, 0.9, 0.95)):
        name = "gradual" if sparsity else "dense"
        yield {"name": name, "sparsity": sparsity, "seed": 0, "epochs": EPOCHS, "distil": distil}


def overhead() -> Iterator[dict[str, Any]]:
    """What the hook takes of a step of ResNet-20."""
    yield {"name": "hook", "sparsity": 0.9}


EPOCHS = 5  # of the gradual part
PARTS = {"oneshot": oneshot, "methods": methods, "gradual": gradual, "overhead": overhead}


def run(part: str, cell: dict[str, Any], device: str) -> dict[str, Any]:
    """A cell's figures."""
    if part == "oneshot":
        return _oneshot(cell, device)
    if part == "overhead":
        return _overhead(device)
    return _trained(20 if part == "methods" else 56, cell, device)


def _oneshot(cell: dict[str, Any], device: str) -> dict[str, Any]:
    model, name, sparsity = resnet(20, device), cell["name"], cell["sparsity"]
    images = cifar("train", device).sample(1024, 0)
    data = [x for x, _ in images.batches(128, device)]
    started = time.perf_counter()
    base, _, allocation = name.partition("-")
    if name == "global-magnitude":
        base, allocation = "magnitude", "global"
    if name == "dense":
        return {"accuracy": accuracy(model, device)}
    steps = 5 if base == "stages" else 1
    reached = _cut(model, "admm" if base == "stages" else base, sparsity, allocation or "uniform", data, steps)
    seconds = time.perf_counter() - started
    plain = accuracy(model, device)
    reestimate_(model, data)
    return {
        "accuracy": plain,
        "reestimated": accuracy(model, device),
        "reached": round(reached, 4),
        "seconds": round(seconds, 1),
    }


def _cut(
    model: nn.Module, method: str, sparsity: float, allocation: str, data: list[torch.Tensor], steps: int
) -> float:
    """In so many steps, each of the same share of what is left; the sparsity that was reached."""
    reached = 0.0
    for step in range(1, steps + 1):
        recipe = secateur.method(
            method, sparsity=1 - (1 - sparsity) ** (step / steps), allocation=allocation, protect=ENDS
        )
        reached = secateur.prune_(model, recipe, data if recipe.needs() else None).sparsity
        if steps > 1:
            reestimate_(model, data)  # the next stage sees the statistics of this one
    return reached


def _trained(depth: int, cell: dict[str, Any], device: str) -> dict[str, Any]:
    model, name, sparsity = resnet(depth, device), cell["name"], cell["sparsity"]
    settings = Settings(
        epochs=cell["epochs"],
        lr=0.05,
        batch=128,
        augment=("flip", "crop"),
        seed=cell["seed"],
        precision="bfloat16" if depth == 56 else "float32",
        distil=cell.get("distil", 0.0),
    )
    batches = Epochs(cifar("train", device), settings.batch, settings.seed, settings.augment, device)
    held: list[Pruner] = []
    started = time.perf_counter()
    solved = None
    if name == "solved":
        data = [x for x, _ in cifar("train", device).sample(1024, 0).batches(128, device)]
        _cut(model, "admm", sparsity, "lamp", data, 5)
        solved = Masks.of_zeros(model)

    def prune(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Pruner:
        criterion, method = ("random", "static") if name == "random" else ("magnitude", name)
        if solved is not None:
            method = "static"
        allocation = "global" if depth == 56 else "erdos-renyi"
        recipe = secateur.method(criterion, sparsity=sparsity, allocation=allocation, protect=ENDS, seed=settings.seed)
        end = 0.5 if depth == 56 else 0.75
        held.append(Pruner(model, recipe, optimizer, steps, method=method, end=end, masks=solved))
        return held[0]

    folder = ROOT / f"build/training/{depth}-{name}-{sparsity}-{cell['seed']}-{cell['epochs']}-{settings.distil}"
    history = finetune_(
        model,
        batches,
        settings,
        prune=None if name == "dense" else prune,
        teacher=resnet(depth, device) if settings.distil else None,
        folder=folder,
        resume=True,
    )
    report = held[0].report() if held else None
    return {
        "accuracy": accuracy(model, device),
        "loss": history[-1].loss,
        "reached": report.sparsity if report else 0.0,
        "violations": report.violations if report else 0,
        "hook": dict(report.seconds) if report else {},
        "refreshes": len(report.refreshes) if report else 0,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _overhead(device: str) -> dict[str, Any]:
    """Medians over steps: with the masks held, refreshes apart."""
    model = resnet(20, device).train()
    x, y = cifar("train", device).batch(range(128), device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    recipe = secateur.method("magnitude", sparsity=0.9, protect=ENDS)
    pruner = Pruner(model, recipe, optimizer, 300, every=10)
    steps: list[float] = []
    held: list[float] = []
    chosen: list[float] = []
    for _ in range(100):
        before, began = dict(pruner.report().seconds), _now(device)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        steps.append(_now(device) - began)
        after = pruner.report().seconds
        held.append(after["hold"] - before["hold"])
        if after["choose"] > before["choose"]:
            chosen.append(after["choose"] - before["choose"])
    return {
        "step_ms": 1e3 * statistics.median(steps),
        "hold_ms": 1e3 * statistics.median(held),
        "share": statistics.median(held) / statistics.median(steps),
        "refresh_ms": 1e3 * statistics.median(chosen),
    }


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Run the cells that are asked for and not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--names", nargs="*", help="of the cells; all by default")
    asked = parser.parse_args()
    number, of = map(int, asked.shard.split("/"))
    cells = [(part, cell) for part in asked.parts for cell in PARTS[part]()]
    cells = [(part, cell) for part, cell in cells if not asked.names or cell["name"] in asked.names]
    done = [{k: row[k] for k in ("part", *row["cell"])} for row in rows(asked.out)]
    for part, cell in cells[number::of]:
        if {"part": part, **cell} in done:
            continue
        found = run(part, cell, asked.device)
        row = {"part": part, **cell, "cell": list(cell), **found, "device": _device(asked.device), "machine": machine()}
        append(asked.out, row)
        print({k: v for k, v in row.items() if k not in ("machine", "cell")}, flush=True)


def _device(device: str) -> str:
    return "cpu" if device == "cpu" else torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
