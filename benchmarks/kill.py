"""Kill a run with SIGKILL at 20 random moments, resume it each time, and compare every file with an undisturbed run's.

The moments are spread over the run: one in each twentieth of its measured duration. Each run is a process of its own,
forked so that it starts pruning at once. Also checked: after the kill nothing has the result's name, unless it is whole,
and the unfinished folder does not load as a model.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from common import RESULTS, machine, write
from secateur import method, prune
from secateur.card import VOLATILE
from secateur.stream.staging import JOURNAL, staging_folder

SEED, KILLS, BATCHES, LENGTH = 0, 20, 8, 64
MODEL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
fork = multiprocessing.get_context("fork")


def model(folder: Path) -> None:
    """A random LLaMA in bfloat16, in several shards."""
    torch.manual_seed(SEED)
    LlamaForCausalLM(LlamaConfig(**MODEL)).bfloat16().save_pretrained(folder, max_shard_size="600KB")


def work(source: Path, out: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(MODEL["vocab_size"], (BATCHES, 1, LENGTH), generator=generator)
    prune(source, method("sparsegpt", sparsity=0.5), [{"input_ids": row} for row in ids], out, resume=resume)


def run(source: Path, out: Path, *, resume: bool = False, kill_after: float | None = None) -> tuple[bool, float]:
    """Run to the end, or until it is killed. Returns whether it was, and the seconds that it had."""
    process = fork.Process(target=work, args=(source, out, resume))
    started = time.perf_counter()
    process.start()
    process.join(kill_after)
    if killed := process.is_alive():
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    elif process.exitcode:
        raise SystemExit(f"a run ended with exit code {process.exitcode}")
    return killed and process.exitcode == -signal.SIGKILL, time.perf_counter() - started


def contents(folder: Path) -> dict[str, Any]:
    """File name -> bytes; secateur.json without the seconds and the memory that it took."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    details = json.loads(found["secateur.json"])
    return found | {"secateur.json": {key: value for key, value in details.items() if key not in VOLATILE}}


def left_behind(out: Path) -> str:
    """What the kill left, in words."""
    partial = staging_folder(out)
    if out.exists():
        return "the whole result"
    if not (partial / JOURNAL).exists():
        return "nothing"
    lines = (partial / JOURNAL).read_text(errors="replace").splitlines()
    blocks = sum(line.startswith('{"block"') for line in lines)
    return f"{blocks} of {MODEL['num_hidden_layers']} blocks" + (", being verified" if _verifying(partial) else "")


def _verifying(partial: Path) -> bool:
    return any(path.is_dir() for path in partial.iterdir())


def loads(folder: Path) -> bool:
    try:
        AutoConfig.from_pretrained(folder)
    except (OSError, ValueError):
        return False
    return True


def one(source: Path, out: Path, moment: float, expected: dict[str, Any]) -> dict[str, Any]:
    """Kill a run after `moment` seconds, resume it, compare."""
    killed, had = run(source, out, kill_after=moment)
    while not killed:  # it was faster than the one that was measured
        shutil.rmtree(out)
        moment *= 0.95
        killed, had = run(source, out, kill_after=moment)
    row: dict[str, Any] = {"killed_after_s": round(had, 3), "left": left_behind(out)}
    row["looked_whole"] = loads(staging_folder(out)) or (out.exists() and contents(out) != expected)
    if not out.exists():
        row["resumed_s"] = round(run(source, out, resume=True)[1], 3)
    row["identical"] = contents(out) == expected
    row["left_over"] = staging_folder(out).exists() and out.exists() and row["left"] != "the whole result"
    shutil.rmtree(out)
    shutil.rmtree(staging_folder(out), ignore_errors=True)
    return row


def main() -> None:
    """Write results/kill.json; exit code 1 when anything was lost."""
    set_verbosity_error()
    disable_progress_bar()
    random.seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "model", Path(folder) / "out"
        writer = fork.Process(target=model, args=(source,))  # threads of torch in this process would not survive a fork
        writer.start()
        writer.join()
        shards = len(list(source.glob("*.safetensors")))
        durations = []
        for _ in range(3):
            shutil.rmtree(out, ignore_errors=True)
            durations.append(run(source, out)[1])
        expected, duration = contents(out), sorted(durations)[1]
        shutil.rmtree(out)
        rows = []
        for kill in range(KILLS):
            rows.append(one(source, out, (kill + random.random()) / KILLS * duration, expected))
            print(f"{kill + 1:2d}  {rows[-1]}", file=sys.stderr)
    whole = [row for row in rows if row["identical"] and not row["looked_whole"] and not row["left_over"]]
    write(
        RESULTS / "kill.json",
        {
            "machine": machine(),
            "seed": SEED,
            "model": MODEL | {"dtype": "bfloat16", "shards": shards},
            "calibration_tokens": BATCHES * LENGTH,
            "files_compared": sorted(expected),
            "undisturbed_s": round(duration, 3),
            "kills": len(rows),
            "bit_identical": sum(row["identical"] for row in rows),
            "moments": rows,
        },
    )
    print(f"{len(whole)} of {len(rows)} killed runs ended bit-identical to the undisturbed one")
    sys.exit(len(whole) < len(rows))


if __name__ == "__main__":
    main()
