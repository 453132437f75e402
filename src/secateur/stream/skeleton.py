"""The model of a folder, built without its weights: what it is, what it computes in, what no checkpoint stores of it."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
from secateur.stream.checkpoint import DTYPES, Checkpoint, adapter, read_json
from secateur.stream.observe import make_observable

LARGE = 1 << 22  # numbers


def check_folder(folder: Path) -> None:
    """Raise SecateurError, with the way out, for a folder that cannot be pruned."""
    if not folder.is_dir():
        raise SecateurError(f"{folder} is not a folder; expected a local Hugging Face model folder or a hub id")
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise SecateurError(adapter(folder))
    config = read_json(folder / "config.json")
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized:
        kind = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else quantized
        raise SecateurError(
            f"{folder} is quantized ({kind}); pruning needs the plain weights.\n"
            "  Prune the original model and quantize the result, or dequantize first "
            "(transformers: model.dequantize(), then save_pretrained)."
        )


def build(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder's config, in eval mode, with parameters on the meta device and real buffers.

    Tied parameters are one object, as they will be once they are loaded.
    """
    import transformers
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    raw = read_json(folder / "config.json")
    architecture = (raw.get("architectures") or [None])[0]
    kind: Any = getattr(transformers, str(architecture), None)
    own_code = SecateurError(
        f"{folder} needs code of its own ({architecture}), and remote code is not run here.\n"
        "  Build the model yourself and prune it in memory: secateur prune --build module:function --weights ..."
    )
    if not hasattr(kind, "_from_config"):
        if raw.get("auto_map"):
            raise own_code
        raise SecateurError(
            f"{folder / 'config.json'} names the architecture {architecture!r}, which transformers "
            f'{transformers.__version__} does not have.\n  Name one in "architectures", or upgrade transformers.'
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with init_empty_weights(include_buffers=False), _NoLargeEmpty():
            model = kind._from_config(config, dtype=dtype)
    except SecateurError:
        raise
    except Exception as error:
        if raw.get("auto_map"):
            raise own_code from None
        raise SecateurError(
            f"transformers cannot build {architecture} from {folder / 'config.json'}: {error}"
        ) from None
    model.tie_weights()
    _keep_float32(model, dtype)
    make_observable(model)
    return model.eval().requires_grad_(False)


class _NoLargeEmpty(TorchFunctionMode):
    """Large uninitialized tensors go to the meta device at once: all experts of a layer, asked of the system before they
    become a parameter, may be more than it promises.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            size = args[0] if args and isinstance(args[0], (list, tuple)) else args or kwargs.get("size", ())
            if math.prod(size) >= LARGE:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _keep_float32(model: Any, dtype: torch.dtype) -> None:
    """Some classes name parts that stock transformers leaves in float32 when it computes in fewer bits."""
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not patterns or dtype not in (torch.float16, torch.bfloat16):
        return
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    for name, parameter in model.named_parameters():
        if kept.search(name) and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def compute(model: Any, names: Collection[str], device: torch.device) -> None:
    """Give parameters that no checkpoint stores (sinusoidal positions) the values that the model's class initializes
    them with.
    """
    for path in sorted({name.rpartition(".")[0] for name in names}):
        module, owner = model.get_submodule(path), model
        for key, parameter in module.named_parameters(recurse=False):
            if f"{path}.{key}".lstrip(".") in names:
                module._parameters[key] = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
        steps = path.split(".") if path else []
        for end in range(len(steps) + 1):
            part = model.get_submodule(".".join(steps[:end]))
            owner = part if hasattr(part, "_init_weights") else owner
        with torch.no_grad():
            owner._init_weights(module)


def may_be_missing(model: nn.Module, name: str) -> bool:
    """Whether the model's class says that checkpoints need not have a parameter."""
    patterns = [
        *(getattr(model, "_keys_to_ignore_on_save", None) or ()),
        *(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()),
    ]
    return any(re.search(pattern, name) for pattern in patterns)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What most of the checkpoint is stored in. Raises SecateurError for dtypes that are not read here."""
    sizes: dict[str, int] = {}
    for name, entry in checkpoint.entries.items():
        if entry.dtype not in DTYPES:
            raise SecateurError(
                f"{name} in {checkpoint.folder / entry.shard} is stored as {entry.dtype}; expected float32, bfloat16 or "
                "float16.\n  Dequantize the checkpoint first (transformers: model.dequantize(), then save_pretrained)."
            )
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.stop - entry.start
    floating = {dtype: size for dtype, size in sizes.items() if DTYPES[dtype].is_floating_point}
    if not floating:
        raise SecateurError(f"{checkpoint.folder} holds no floating-point tensors: nothing can be pruned")
    return DTYPES[max(floating, key=floating.__getitem__)]


def compute_dtype(name: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What the model computes in: as asked, or at least float32 on a CPU and the stored dtype on an accelerator."""
    if name != "auto":
        found = getattr(torch, name, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise SecateurError(f"dtype {name!r} is none to compute in: auto, float32, bfloat16, float16 or float64")
        return found
    return torch.promote_types(stored, torch.float32) if device.type == "cpu" else stored
