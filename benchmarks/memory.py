"""Peak memory of pruning a checkpoint bigger than it: a synthetic LLaMA of 4 GB, in shards, by Wanda, by SparseGPT, and in
its structure (30 % of the neurons, a quarter of the heads, by magnitude, cut on the shards).

    python benchmarks/memory.py [--blocks 33] [--methods wanda,sparsegpt,structure]

Writes results/memory.json: anonymous memory (RssAnon) above that after the imports, its peak and its curve over blocks.
Each method runs in a process of its own. Needs 9 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HIDDEN, FFN, VOCABULARY, SHARD = 2048, 8192, 32000, 600 << 20
SAMPLES, LENGTH = 8, 256


def main() -> None:
    """Write the checkpoint, prune it with each method, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=33)
    parser.add_argument("--methods", default="wanda,sparsegpt,structure")
    parser.add_argument("--folder", type=Path, help="where to put the checkpoint (default: a temporary folder)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.folder)))
        return
    from common import RESULTS, machine, write

    folder = args.folder or Path(tempfile.mkdtemp(prefix="secateur-memory-"))
    try:
        size = write_checkpoint(folder / "model", args.blocks)
        found = {}
        for method in args.methods.split(","):
            command = [sys.executable, __file__, "--child", method, "--folder", str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[method] = json.loads(done.stdout.splitlines()[-1])
            peak = found[method]["peak_above_imports"] / 1e9
            print(f"{method}: {peak:.3f} GB above imports, {found[method]['seconds']:.0f} s")
        setting = {
            "blocks": args.blocks,
            "hidden": HIDDEN,
            "ffn": FFN,
            "bytes": size,
            "samples": SAMPLES,
            "length": LENGTH,
        }
        path = RESULTS / "memory.json"
        earlier = json.loads(path.read_text()) if path.exists() else {}
        kept = earlier.get("methods", {}) if earlier.get("setting") == setting else {}
        for method in found:
            found[method]["machine"] = machine()
        write(path, {"setting": setting, "methods": kept | found, "machine": earlier.get("machine", machine())})
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


def write_checkpoint(folder: Path, blocks: int) -> int:
    """A random bfloat16 LLaMA in shards, written shard by shard. Returns its bytes."""
    import torch
    from safetensors.torch import save_file

    if (folder / "config.json").exists():  # written last
        if json.loads((folder / "config.json").read_text()) != config(blocks):
            raise SystemExit(f"{folder} holds another checkpoint: delete it, or name another --folder")
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    names: dict[str, int] = {}

    def flush() -> None:
        save_file(shards[-1], folder / f"shard-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        shards[-1] = {}
        shards.append({})

    for name, shape in tensors(blocks):
        value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        shards[-1][name] = value.to(torch.bfloat16)
        names[name] = len(shards)
        if sum(tensor.nbytes for tensor in shards[-1].values()) > SHARD:
            flush()
    if shards[-1]:
        flush()
    number = len(shards) - 1
    for index in range(1, number + 1):
        os.replace(folder / f"shard-{index:05d}.safetensors", folder / f"model-{index:05d}-of-{number:05d}.safetensors")
    weight_map = {name: f"model-{index:05d}-of-{number:05d}.safetensors" for name, index in names.items()}
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config(blocks)))
    return size


def tensors(blocks: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the file."""
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for index in range(blocks):
        prefix = f"model.layers.{index}"
        for name in "qkvo":
            found.append((f"{prefix}.self_attn.{name}_proj.weight", (HIDDEN, HIDDEN)))
        found.append((f"{prefix}.mlp.gate_proj.weight", (FFN, HIDDEN)))
        found.append((f"{prefix}.mlp.up_proj.weight", (FFN, HIDDEN)))
        found.append((f"{prefix}.mlp.down_proj.weight", (HIDDEN, FFN)))
        found.append((f"{prefix}.input_layernorm.weight", (HIDDEN,)))
        found.append((f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)))
    return [*found, ("model.norm.weight", (HIDDEN,)), ("lm_head.weight", (VOCABULARY, HIDDEN))]


def config(blocks: int) -> dict[str, Any]:
    """A LLaMA of these shapes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": blocks,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def child(name: str, folder: Path) -> dict[str, Any]:
    """Prune in this process and watch it."""
    import torch

    from secateur import method, prune
    from secateur.memory import anonymous_memory
    from secateur.smaller import Smaller, remove

    torch.set_num_threads(2)
    # everything that a first call would import or allocate once
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.randn(256, 256) @ torch.randn(256, 256)
    base, peak, stop = anonymous_memory(), [0], threading.Event()
    curve: list[dict[str, Any]] = []
    recent = [0]

    def watch() -> None:
        while not stop.wait(0.005):
            now = anonymous_memory()
            peak[0], recent[0] = max(peak[0], now), max(recent[0], now)

    def progress(stage: str, done: int, of: int, detail: str) -> None:
        curve.append(
            {"before": detail, "stage": stage, "now": anonymous_memory() - base, "peak_since": recent[0] - base}
        )
        recent[0] = 0

    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(0, VOCABULARY, (1, LENGTH), generator=generator)} for _ in range(SAMPLES)]
    out = folder / f"pruned-{name}"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    if name == "structure":
        wanted = Smaller(remove={"ffn": 0.3, "heads": 0.25}, criterion="magnitude")
        found = remove(folder / "model", wanted, out, progress=progress, in_memory=False)
        details: dict[str, Any] = {"before": found.before, "after": found.after, "loads with": found.loads_with}
    else:
        report = prune(folder / "model", method(name, sparsity=0.5), batches, out, progress=progress)
        details = {"stages": report.seconds, "sparsity": report.sparsity, "verified": report.verified}
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    shutil.rmtree(out)
    return {
        "after_imports": base,
        "peak_above_imports": peak[0] - base,
        "seconds": seconds,
        **details,
        "curve": curve,
    }


if __name__ == "__main__":
    main()
