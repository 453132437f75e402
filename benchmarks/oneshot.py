"""Quality of one-shot pruning on SmolLM2-135M, beside the figures of the authors' own code where those are at hand.

    python benchmarks/oneshot.py --model SMOLLM2 [--cells admm:0.6,wanda:2:4]

Calibration: 64 windows of 512 tokens of WikiText-2 `valid`. Perplexity: 64 windows of `test`. One line per cell goes to
results/oneshot.jsonl; cells that are there already are skipped, so that a stopped run goes on. An hour or two on 2 cores.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, SHARED, append, machine, rows, wikitext
from secateur import method, prune
from secateur.data import windows
from secateur.data.text import load_text
from secateur.measure.quality import token_losses

CELLS = (
    "dense:0 admm:0.6 sparsegpt:0.6 admm:0.5 admm:2:4 wanda:0.5 admm:0.7 magnitude:0.5 sparsegpt:2:4 sparsegpt:0.5 "
    "sparsegpt:0.7 wanda:2:4 wanda:0.6 wanda:0.7 admm:4:8 sparsegpt:4:8 wanda:4:8 sparsegpt:0.8 admm:0.8"
)


def main() -> None:
    """Run the cells that are not there yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--cells", default=CELLS.replace(" ", ","))
    parser.add_argument("--results", type=Path, default=RESULTS / "oneshot.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(2)
    done = {row["cell"] for row in rows(args.results)}
    for cell in args.cells.split(","):
        if cell not in done:
            row = run(args.model, cell)
            append(args.results, {**row, "machine": machine()})
            print(f"{cell:16} perplexity {row['perplexity']:.3f}  {row['seconds']:.0f} s", flush=True)
    print(table(args.results))


def run(model: Path, cell: str) -> dict[str, Any]:
    """Prune and measure one cell: "method:sparsity" or "method:N:M"."""
    name, _, pattern = cell.partition(":")
    calibration = {"source": wikitext("valid"), "samples": 64, "length": 512}
    how: dict[str, Any] = {"granularity": pattern} if ":" in pattern else {"sparsity": float(pattern)}
    started = time.perf_counter()
    if name == "dense":
        return {"cell": cell, "sparsity": 0.0, "seconds": 0.0, **perplexity(model)}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned"
        report = prune(model, method(name, calibration=calibration, **how), None, out)
        seconds = time.perf_counter() - started
        measured = perplexity(out)
        shutil.rmtree(out)
    return {
        "cell": cell,
        "sparsity": report.sparsity,
        "seconds": seconds,
        "stages": report.seconds,
        "peak_memory": report.peak_memory,
        "notes": len(report.notes),
        **measured,
    }


def perplexity(folder: Path) -> dict[str, Any]:
    """On 64 windows of `test`, with stock transformers in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text, _ = load_text(wikitext("test"), None)
    ids = windows(text, AutoTokenizer.from_pretrained(folder), 512, 64, seed=None)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = token_losses(model, ids).double().mean(1)
    return {"perplexity": math.exp(losses.mean()), "nll_per_window": [round(float(x), 5) for x in losses]}


def table(results: Path) -> str:
    """Ours beside the reference figures, and the ratio of log-perplexity increases over SparseGPT's."""
    reference = {}
    for row in rows(SHARED / "baselines/smollm2.jsonl"):
        reference[f"{row['method']}:{row['pattern'].replace('/', ':')}"] = row["ppl"]
    ours = {row["cell"]: row["perplexity"] for row in rows(results)}
    dense = math.log(reference.get("dense:-", ours.get("dense:0", 1.0)))
    lines = ["| cell | ours | reference | ours / reference | log increase over SparseGPT's |", "|---|---|---|---|---|"]
    for cell, value in ours.items():
        peer = reference.get("dense:-" if cell == "dense:0" else cell)
        gpt = reference.get("sparsegpt:" + cell.partition(":")[2])
        ratio = f"{value / peer:.4f}" if peer else ""
        share = f"{(math.log(value) - dense) / (math.log(gpt) - dense):.3f}" if gpt else ""
        lines.append(f"| {cell} | {value:.2f} | {(peer and round(peer, 2)) or ''} | {ratio} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
