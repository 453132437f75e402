"""Is what was removed really gone? Latency, bytes and peak memory of models before and after, at half of the MACs.

    python benchmarks/latency.py [--models resnet50,vit-b,llama-300m]

Random weights of the published shapes. Both models run in turns in one process; medians. Peak memory is that of a process
of its own that loads the weights and runs. Writes results/latency.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import RESULTS, machine, write

REPEATS = 15


def build(name: str, device: str = "cpu") -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The model, its inputs (on the CPU), and what a plan for half of its MACs may take from."""
    import transformers

    torch.manual_seed(0)
    images, text = {"pixel_values": torch.randn(1, 3, 224, 224)}, {"input_ids": torch.randint(0, 32000, (1, 128))}
    with torch.device(device):
        if name == "resnet50":
            model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
            return model.eval(), images, {}
        if name == "vit-b":
            model = transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000))
            return model.eval(), images, {"include": ["ffn", "heads"]}
        config = transformers.LlamaConfig(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=20,
            num_attention_heads=16,
            num_key_value_heads=16,
        )
        model = transformers.LlamaForCausalLM(config)
    return model.eval(), {**text, "use_cache": False}, {"include": ["ffn", "heads"]}


def cut(model: nn.Module, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
    """Half of the multiply-accumulates."""
    from secateur.structure import apply_, plan, trace

    couplings = trace(model, inputs)
    found = plan(couplings, target={"macs": 0.5}, least=0.05, **options)
    apply_(model, found, inputs)
    return found


def timed(models: list[nn.Module], inputs: dict[str, Any]) -> list[float]:
    """Median milliseconds of a forward of each, in turns."""
    seen: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for repeat in range(REPEATS + 2):
            for model, times in zip(models, seen, strict=True):
                started = time.perf_counter()
                model(**inputs)
                if repeat > 1:
                    times.append(1000 * (time.perf_counter() - started))
    return [statistics.median(times) for times in seen]


def decoding(models: list[nn.Module]) -> list[float]:
    """Median milliseconds per token of greedy decoding, in turns."""
    seen: list[list[float]] = [[] for _ in models]
    prompt = torch.randint(0, 32000, (1, 16), generator=torch.Generator().manual_seed(0))
    for repeat in range(4):
        for model, times in zip(models, seen, strict=True):
            started = time.perf_counter()
            model.generate(prompt, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)  # type: ignore[operator]
            if repeat:
                times.append(1000 * (time.perf_counter() - started) / 24)
    return [statistics.median(times) for times in seen]


def measure(name: str) -> dict[str, Any]:
    """A row: before and after."""
    torch.set_num_threads(2)
    model, inputs, options = build(name)
    before = copy.deepcopy(model)
    found = cut(model, inputs, options)
    old, new = timed([before, model], inputs)
    row: dict[str, Any] = {
        "params": [found.before["params"], found.after["params"]],
        "macs": [found.before["macs"], found.after["macs"]],
        "bytes": [found.before["bytes"], found.after["bytes"]],
        "forward ms": [old, new],
        "speed-up": old / new,
        "peak bytes": [peak(name, before, None), peak(name, model, found)],
        "left": {r.kind: f"{r.size} -> {r.left}" for r in found.removals if r.left < r.size},
    }
    if hasattr(model, "generate") and name.startswith("llama"):
        a, b = decoding([before, model])
        row |= {"token ms": [a, b], "decoding speed-up": a / b}
    return row


def peak(name: str, model: nn.Module, found: Any) -> int:
    """Peak memory above the imports of a process that loads the weights and runs. found: the plan that was applied."""
    from safetensors.torch import save_model

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, str(Path(folder) / "model.safetensors"))
        plan = Path(folder) / "plan.json"
        plan.write_text(json.dumps(None if found is None else found.to_json()))
        command = [sys.executable, __file__, "--child", name, "--folder", folder]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def child(name: str, folder: Path) -> None:
    """Build without memory, give it its shapes, load, run."""
    from safetensors.torch import load_model

    from secateur.memory import anonymous_memory
    from secateur.structure.apply import reshape_
    from secateur.structure.plans import Plan

    torch.set_num_threads(2)
    model, inputs, _ = build(name, "meta")
    content = json.loads((folder / "plan.json").read_text())
    if content is not None:
        reshape_(model, Plan.from_json(content))
    base, most, stop = anonymous_memory(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            most[0] = max(most[0], anonymous_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    model.to_empty(device="cpu")
    load_model(model, str(folder / "model.safetensors"), strict=False)
    with torch.no_grad():
        model(**inputs)
    stop.set()
    thread.join()
    print(json.dumps({"peak": most[0] - base}))


def main() -> None:
    """Measure all models, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet50,vit-b,llama-300m")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder)
        return
    path = RESULTS / "latency.json"
    found = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in args.models.split(","):
        found[name] = measure(name)
        print(name, json.dumps({k: v for k, v in found[name].items() if k != "left"}))
        write(path, {"models": found, "machine": machine()})


if __name__ == "__main__":
    main()
