"""Where the time goes when SmolLM2-135M is pruned: seconds per stage for each method.

    python benchmarks/end_to_end.py --model SMOLLM2 [--methods magnitude,wanda,sparsegpt,admm] [--samples 64]

Writes results/end_to_end.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from common import RESULTS, machine, wikitext, write
from secateur import method, prune


def main() -> None:
    """Prune once per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--methods", default="magnitude,wanda,sparsegpt,admm")
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(2)
    calibration = {"samples": args.samples, "length": 512, "source": wikitext("valid")}
    found = {}
    for name in args.methods.split(","):
        with tempfile.TemporaryDirectory() as folder:
            recipe = method(name, sparsity=0.5, calibration=calibration)
            report = prune(args.model, recipe, None, Path(folder) / "out")
        found[name] = {"seconds": report.seconds, "peak_memory": report.peak_memory}
        print(name, {stage: round(value, 1) for stage, value in report.seconds.items()}, flush=True)
    write(RESULTS / "end_to_end.json", {"tokens": args.samples * 512, "methods": found, "machine": machine()})


if __name__ == "__main__":
    main()
