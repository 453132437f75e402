"""A strategy and its rounds, on real classifiers: what it proposes, where it stops, how long that takes.

    python benchmarks/strategy.py resnet56          # CIFAR-10, three epochs a round; an hour on two cores
    python benchmarks/strategy.py resnet56-short    # the same with one epoch a round
    python benchmarks/strategy.py efficientnet      # a sample of ImageNet of 1,000 images: too few to train on
    python benchmarks/strategy.py vit               # 150M random parameters: memory, and what it will take

Pages and recipes go to build/strategy, figures to results/strategy.jsonl.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_model
from torch import nn

from common import RESULTS, ROOT, SHARED, append, machine
from vision import CifarResNet, efficientnet_lite0, fetch

WORK = ROOT / "build/strategy"
OUT = RESULTS / "strategy.jsonl"


def resnet56() -> nn.Module:
    """The public checkpoint's architecture."""
    return CifarResNet(56)


def efficientnet() -> nn.Module:
    """EfficientNet-Lite0."""
    model = efficientnet_lite0()
    assert model is not None
    return model


class ViT(nn.Module):
    """Torch's own encoder layers on patches: 12 blocks of 1,020, 152M parameters."""

    def __init__(self, width: int = 1020, depth: int = 12, patch: int = 16, size: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.place = nn.Parameter(torch.zeros(1, (size // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(1))


def vit() -> nn.Module:
    """A ViT of 152M parameters."""
    torch.manual_seed(0)
    return ViT()


CIFAR = [
    f"--data={SHARED}/data/cifar10/test.npz",
    f"--train={SHARED}/data/cifar10/train.npz",
    "--tolerance=1%",
    "--distil=0.7",
    "--augment=flip,crop",
    "--precision=bfloat16",
    "--images=128",
]
CASES = {
    "resnet56": [*CIFAR, "--epochs=3", "--lr=0.05", "--keep=0.46", "--target=0.9"],
    "resnet56-short": [*CIFAR, "--epochs=1", "--lr=0.02", "--keep=0.65"],
    "efficientnet": [
        f"--data={SHARED}/data/imagenet_sample/images.npz",
        "--mean=0.49804,0.49804,0.49804",
        "--std=0.50196,0.50196,0.50196",
        "--epochs=1",
        "--batch=16",
        "--lr=0.002",
        "--distil=0.9",
        "--keep=0.8",
        "--images=64",
    ],
    "vit": [f"--data={WORK}/vit.npz", "--images=2", "--epochs=1"],
}


def weights(name: str) -> Path:
    """The weights as a file."""
    if name.startswith("resnet56"):
        return SHARED / "models/resnet56.safetensors"
    path = WORK / f"{name}.safetensors"
    if not path.exists():
        save_model(globals()[name](), str(path))
    if name == "vit":
        images = np.random.default_rng(0).integers(0, 255, (64, 224, 224, 3), dtype=np.uint8)
        np.savez(WORK / "vit.npz", images=images, labels=np.arange(64) % 8)
    return path


def main() -> None:
    """Run a case through the command line, as a user would."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--no-rounds", action="store_true", help="only look and propose")
    asked = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    fetch("pillow==12.0.0", "PIL")
    out = WORK / asked.case
    command = [sys.executable, "-m", "secateur.cli"]
    scan = [
        *command,
        "strategy",
        f"--build=strategy:{asked.case.partition('-')[0]}",
        f"--weights={weights(asked.case)}",
        *CASES[asked.case],
    ]
    row = {"case": asked.case, "expected": _json([*scan, f"--out={WORK}/{asked.case}-dry", "--dry-run"])["expected"]}
    if not out.exists():
        _json([*scan, f"--out={out}", "--resume"])
    found = json.loads((out / "strategy.json").read_text(encoding="utf-8"))
    row |= {
        "dense": found["dense"]["top1"],
        "allocation": "measured" if found["recipe"]["overrides"] else found["recipe"]["allocation"],
        "untrained": _untrained(found),
        "scan_seconds": found["seconds"]["scan"],
        "strategy_seconds": found["seconds"]["total"],
        "peak_gb": _peak(),
    }
    if asked.case != "vit" and not asked.no_rounds:
        result = _json([*command, "run", str(out / "recipe.yaml"), "--resume"])
        trials = [
            {k: t[k] for k in ("sparsity", "verdict")} | {k: t["measures"][k] for k in ("drop", "noise")}
            for t in result["trials"]
        ]
        kept = next(t for t in result["trials"] if t["number"] == result["best"])
        row |= {"ended": result["ended"], "sparsity": result["sparsity"], "drop": kept["measures"]["drop"]}
        row |= {"noise": kept["measures"]["noise"], "top1": kept["measures"]["top1"], "trials": trials}
        row |= {"run_seconds": result["seconds"], "run_peak_gb": _peak()}
    append(OUT, row | {"machine": machine()})
    print(json.dumps(row, indent=1))


def _untrained(found: dict) -> dict[str, float]:
    """Top-1 by target sparsity with the chosen allocation, nothing trained."""
    name = "measured" if found["recipe"]["overrides"] else found["recipe"]["allocation"]
    return {f"{a['sparsity']:.2f}": a["top1"] for a in found["allocations"] if a["allocation"] == name}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def _json(command: list[str]) -> dict:
    done = subprocess.run(
        [*command, "--json"], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout)
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
