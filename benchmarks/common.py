"""What every benchmark shares: where its inputs lie, what machine it ran on, JSON that grows a line at a time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SECATEUR_SHARED", ROOT.parent / "shared"))  # data/wikitext2, baselines: not in here
RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Processor, threads, versions and commit."""
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "processor": names[0].split(":")[1].strip() if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
    }


def wikitext(split: str) -> Path:
    """The text of a split of WikiText-2. Exits where it is not to be found."""
    path = SHARED / f"data/wikitext2/{split}.txt"
    if not path.exists():
        raise SystemExit(
            f"{path} does not exist: put WikiText-2 there, or set SECATEUR_SHARED to the folder above data/"
        )
    return path


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line, at once on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """What earlier runs wrote."""
    yield from (json.loads(line) for line in _lines(path) if line.strip())


def write(path: Path, content: Any) -> None:
    """A whole JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
