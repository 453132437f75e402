"""The main job on a real language model: prune SmolLM2-135M by half, measure, and let it speak before and after.

python scripts/demo_llm.py --model build/smollm2 [--sparsity 0.5] [--samples 16]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import smollm2
import torch

PROMPT = "The capital of France is"


def main() -> None:
    """Fetch, prune, evaluate, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--sparsity", default="0.5")
    parser.add_argument("--samples", default="16", help="calibration windows of 512 tokens; more is better and slower")
    args = parser.parse_args()
    dense = smollm2.main(args.model)
    pruned = dense.with_name(f"{dense.name}-{args.sparsity}")
    for leftover in (pruned, pruned.with_name(pruned.name + ".partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    secateur = [str(Path(sys.executable).with_name("secateur"))]
    run = subprocess.run(
        [*secateur, "prune", str(dense), "--sparsity", args.sparsity, "--samples", args.samples, "--out", str(pruned)],
        check=False,
    )
    if run.returncode:
        sys.exit(run.returncode)
    print(f"\n  dense:  {speak(dense)}\n  pruned: {speak(pruned)}\n")
    print(f"The pruned model is in {pruned}. Measure it on a text of yours:")
    print(f"  secateur eval {pruned} --against {dense} --text FILE")


def speak(folder: Path) -> str:
    """A greedy continuation of PROMPT."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True).replace("\n", " ")


if __name__ == "__main__":
    main()
