"""A model built without its weights, and the checkpoint they come from and go to, a block at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.stream.checkpoint import DTYPES, Checkpoint, open_checkpoint, read_json
from secateur.stream.naming import Group, Naming, Read

HEAVY = 32 << 20  # bytes: tables outside the blocks larger than this are loaded when they are called
NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".py")


class Source:
    """A model folder: a skeleton whose parameters are on the meta device, filled block by block."""

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        """Raises SecateurError for anything that is not a plain, unquantized safetensors folder."""
        self.folder = folder
        self.config = check_folder(folder)
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.device = torch.device(device)
        self.stored = _stored_dtype(self.checkpoint)
        self.dtype = compute_dtype(dtype, self.stored, self.device)
        self.model = build(folder, self.dtype)
        self.naming = Naming(self.model, self.checkpoint.entries)
        self._stored_dtypes: dict[str, torch.dtype] = {}
        self._lazy: dict[str, nn.Module] = {}
        self._check_complete()

    def other_files(self) -> list[str]:
        """Files that the result takes over as they are: configuration, tokenizer, processor."""
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if path.is_file()
            and not path.name.startswith(".")
            and not path.name.endswith(NOT_COPIED)
            and path.name not in ("README.md", "secateur.json")
        )

    def load(self, prefix: str, read: Read | None = None) -> None:
        """Fill the parameters and buffers below a module from the checkpoint, or from what `read` gives."""
        for group in self.naming.within(prefix):
            self._fill(group, read)
        if not prefix:
            self._tie()

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """What the checkpoint stores a parameter as."""
        return self._stored_dtypes[parameter]

    def load_outside(self, blocks: Mapping[str, nn.Module]) -> None:
        """Fill everything that is in no block; heavy tables only when they are called, the output head not at all."""
        if "" in blocks:
            return
        inside = tuple(f"{name}." for name in blocks)
        lazy = self._heavy_tables(inside)
        for group in self.naming.groups.values():
            if not group.key.startswith(inside) and group.key.rpartition(".")[0] not in lazy:
                self._fill(group, None)
        self._tie()
        for name, module in lazy.items():
            module.register_forward_pre_hook(lambda _module, _args, name=name: self._load_table(name))
        self._lazy = lazy

    def free_tables(self) -> None:
        """Drop heavy tables until they are called again."""
        for module in self._lazy.values():
            empty(module)

    def parameters(self, prefix: str, names: set[str]) -> dict[str, Tensor]:
        """Name on disk -> tensor, for the groups below a module that hold one of the named parameters."""
        out: dict[str, Tensor] = {}
        state = {f"{prefix}.{k}" if prefix else k: v for k, v in self.model.get_submodule(prefix).state_dict().items()}
        for group in self.naming.within(prefix):
            members = {group.key} if group.converter is None else self._members(group)
            if members & names:
                out.update(self.naming.disassemble(group, {name: state[name] for name in members}))
        return out

    def _members(self, group: Group) -> set[str]:
        return set(self.naming.assemble(group, self.checkpoint.read))

    def _fill(self, group: Group, read: Read | None) -> None:
        made = self.naming.assemble(group, read or self.checkpoint.read)
        if read is None:
            self.naming.verify(group, made, self.checkpoint.read)
        for name, tensor in made.items():
            self._stored_dtypes[name] = tensor.dtype
            self._set(name, tensor)

    def _set(self, name: str, tensor: Tensor) -> None:
        path, _, key = name.rpartition(".")
        module = self.model.get_submodule(path)
        current = getattr(module, key)
        if current.shape != tensor.shape:
            raise SecateurError(
                f"{name} has shape {list(tensor.shape)} in the checkpoint; config.json makes it {list(current.shape)}.\n"
                "  The config and the weights do not belong together."
            )
        value = tensor.to(self.device, current.dtype, copy=True)
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[key] = value

    def _heavy_tables(self, inside: tuple[str, ...]) -> dict[str, nn.Module]:
        size = torch.empty(0, dtype=self.dtype).element_size()
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Embedding, nn.Linear))
            and not f"{name}.".startswith(inside)
            and module.weight.numel() * size > HEAVY
        }

    def _load_table(self, name: str) -> None:
        module = self.model.get_submodule(name)
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            groups = self.naming.within(name)
            if not groups:  # tied to a table under another name
                groups = self.naming.within(self._tied_to(name))
            for group in groups:
                made = self.naming.assemble(group, self.checkpoint.read)
                for key, tensor in made.items():
                    self._set(f"{name}.{key.rpartition('.')[2]}", tensor)

    def _tied_to(self, name: str) -> str:
        for tied in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            for one, other in (tied, tied[::-1]):
                if one == f"{name}.weight" and self.naming.within(other.rpartition(".")[0]):
                    return other.rpartition(".")[0]
        raise SecateurError(f"the checkpoint has no weights for {name}")

    def _tie(self) -> None:
        if hasattr(self.model, "tie_weights"):
            self.model.tie_weights()  # type: ignore[operator]

    def _check_complete(self) -> None:
        made: set[str] = set()
        for group in self.naming.groups.values():
            made |= {group.key} if group.converter is None else self._shapes(group)
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        wanted = {name for name, parameter in self.model.named_parameters() if parameter.is_meta}
        missing = sorted(wanted - made - set(tied) - set(tied.values()))
        if missing:
            raise SecateurError(
                f"{self.folder} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "") + ".\n"
                f"  config.json asks for a {type(self.model).__name__}; the weights are another model's, or incomplete."
            )

    def _shapes(self, group: Group) -> set[str]:
        """The names that a conversion makes, found on the meta device."""
        entries = self.checkpoint.entries
        return set(
            self.naming.assemble(
                group, lambda name: torch.empty(entries[name].shape, dtype=DTYPES[entries[name].dtype], device="meta")
            )
        )


def empty(module: nn.Module) -> None:
    """Put the parameters and stored buffers of a module on the meta device."""
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)


def check_folder(folder: Path) -> dict[str, Any]:
    """The config of a folder that can be pruned. Raises SecateurError with the way out for one that cannot."""
    if not folder.is_dir():
        raise SecateurError(f"{folder} is not a folder; expected a local Hugging Face model folder or a hub id")
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise SecateurError(
            f"{folder} holds an adapter, not a model. Merge it into its base model first "
            "(peft: model.merge_and_unload(), then save_pretrained)."
        )
    config = read_json(folder / "config.json")
    quantized = config.get("quantization_config") or config.get("compression_config")
    if quantized:
        kind = quantized.get("quant_method", "unknown method") if isinstance(quantized, dict) else quantized
        raise SecateurError(
            f"{folder} is quantized ({kind}); pruning needs the plain weights.\n"
            "  Prune the original model and quantize the result, or dequantize first "
            "(transformers: model.dequantize(), then save_pretrained)."
        )
    return config


def build(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a folder's config, in eval mode, with parameters on the meta device and real buffers."""
    import transformers
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    raw = read_json(folder / "config.json")
    architecture = (raw.get("architectures") or [None])[0]
    kind = getattr(transformers, str(architecture), None)
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
        with init_empty_weights(include_buffers=False):
            model = kind._from_config(config, dtype=dtype)
    except SecateurError:
        raise
    except Exception as error:
        if raw.get("auto_map"):
            raise own_code from None
        raise SecateurError(
            f"transformers cannot build {architecture} from {folder / 'config.json'}: {error}"
        ) from None
    if hasattr(model, "set_experts_implementation"):
        eager_experts(model)
    return model.eval().requires_grad_(False)


def eager_experts(model: Any) -> None:
    """Have stacked experts multiplied one by one, so that each one's inputs can be seen."""
    try:
        model.set_experts_implementation("eager")
    except (ValueError, AttributeError, KeyError):
        return


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
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
    """What the model computes in: as asked, or float32 on a CPU and the stored dtype on an accelerator."""
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else stored
