"""Read a folder of safetensors shards, and trust nothing in it: names, headers, offsets and values are checked."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import SecateurError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
OWN = {SINGLE: "secateur.safetensors", INDEX: "secateur.safetensors.index.json"}  # of what stock libraries cannot build
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
MOST_HEADER = 100_000_000  # bytes, the format's own limit
QUANTIZED = (".qweight", ".qzeros", ".SCB", ".absmax", ".quant_map", ".weight_packed", ".weight_scale", "_scale_inv")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: bytes start..stop of a shard."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def needs_ours(folder: Path) -> bool:
    """Whether structure was removed that the config does not say, so that only `secateur.load` builds the model."""
    return any((folder / name).exists() for name in OWN.values())


class Checkpoint:
    """The tensors of a folder by name. Files are mapped, not read, until a tensor is asked for."""

    def __init__(self, folder: Path, entries: dict[str, Entry], shards: list[str]) -> None:
        self.folder, self.entries, self.shards = folder, entries, shards
        self._open: dict[str, Any] = {}

    def read(self, name: str) -> Tensor:
        """The tensor, backed by the mapped file. Raises SecateurError when it has NaN or Inf."""
        entry = self.entries[name]
        if entry.shard not in self._open:
            self._open[entry.shard] = safe_open(self.folder / entry.shard, framework="pt", device="cpu")
        tensor = self._open[entry.shard].get_tensor(name)
        if tensor.is_floating_point() and not _finite(tensor):
            raise SecateurError(
                f"{name} in {self.folder / entry.shard} has NaN or Inf values; expected finite weights.\n"
                f"  The checkpoint is damaged, or its training diverged: export it again from the last good step."
            )
        return tensor

    def close(self) -> None:
        """Unmap the shards."""
        self._open.clear()

    @property
    def bytes(self) -> int:
        """Size of all shards on disk."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    def fingerprint(self) -> str:
        """Changes when the config, or a shard's header, size or modification time does."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for shard in self.shards:
            path = self.folder / shard
            stat = path.stat()
            digest.update(f"{shard} {stat.st_size} {stat.st_mtime_ns} ".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 16))
        return digest.hexdigest()


def _finite(tensor: Tensor, chunk: int = 1 << 22) -> bool:
    flat = tensor.flatten()
    return all(bool(torch.isfinite(part).all()) for part in flat.split(chunk))


def open_checkpoint(folder: Path) -> Checkpoint:
    """Check every header against its file and the index against the headers. Raises SecateurError."""
    shards, weight_map = _shards(folder)
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in _header(folder / shard).items():
            if name in entries:
                raise SecateurError(f"{folder}: tensor {name} is in both {entries[name].shard} and {shard}")
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries or entries[name].shard != shard:
            where = entries[name].shard if name in entries else "no shard"
            raise SecateurError(
                f"{folder / INDEX} puts {name} into {shard}, but it is in {where}.\n"
                "  The index and the shards do not belong together: download or export the checkpoint again."
            )
    if weight_map:
        entries = {name: entry for name, entry in entries.items() if name in weight_map}
    _plain(folder, entries)
    return Checkpoint(folder, entries, shards)


def open_file(path: Path) -> Checkpoint:
    """A single safetensors file, by whatever name. Raises SecateurError."""
    entries = _header(path)
    _plain(path.parent, entries)
    for name, entry in entries.items():
        if entry.dtype not in DTYPES:
            raise SecateurError(f"{name} in {path} is stored as {entry.dtype}; known: {', '.join(DTYPES)}")
    return Checkpoint(path.parent, entries, [path.name])


def _plain(folder: Path, entries: dict[str, Entry]) -> None:
    """Raise SecateurError for weights that are packed or scaled, whatever the config says of them."""
    for name, entry in entries.items():
        if name.endswith(QUANTIZED) or entry.dtype.startswith("F8"):
            raise SecateurError(
                f"{name} in {folder / entry.shard} ({entry.dtype}) is part of a quantized weight; pruning needs the plain "
                "weights.\n  Prune the original model and quantize the result, or dequantize first "
                "(transformers: model.dequantize(), then save_pretrained)."
            )


def _shards(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The shards' file names in order, and the index's weight map (empty without an index)."""
    for single, index in ((SINGLE, INDEX), (OWN[SINGLE], OWN[INDEX])):
        if (folder / single).exists():  # stock libraries too take it before an index beside it
            return [single], {}
        if (folder / index).exists():
            return _indexed(folder, folder / index)
    raise SecateurError(_nothing_to_open(folder))


def _indexed(folder: Path, index: Path) -> tuple[list[str], dict[str, str]]:
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise SecateurError(f"{index}: expected a weight_map from tensor names to shard files")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise SecateurError(f"{index} names {shard!r}; expected a .safetensors file inside the folder itself")
        if not (folder / shard).is_file():
            raise SecateurError(f"{index} names {shard}, which is not in {folder}: the download is incomplete")
    return shards, weight_map


def adapter(folder: Path) -> str:
    """The message for a folder that holds an adapter alone."""
    return (
        f"{folder} holds an adapter, not a model. Merge it into its base model first "
        "(peft: model.merge_and_unload(), then save_pretrained)."
    )


def _nothing_to_open(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        return adapter(folder)
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return (
            f"{folder} has its weights as pickle files ({pickles[0]}), which can run code when they are opened; "
            "expected .safetensors.\n  If you trust the source, load it with transformers once and save_pretrained it."
        )
    if any(name.endswith(".gguf") for name in names):
        return f"{folder} holds a GGUF file; expected safetensors. Convert it with transformers' gguf_file= first."
    return f"{folder} has no {SINGLE} and no {INDEX}: expected a Hugging Face model folder"


def _header(path: Path) -> dict[str, Entry]:
    """Every tensor of a shard, after the format's own parser has accepted the file."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            if size < 8:
                raise SecateurError(_damaged(path, f"it has {size} bytes; the header's length alone takes 8"))
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(MOST_HEADER, size - 8):
                raise SecateurError(_damaged(path, f"its header claims {length} bytes, the file has {size}"))
            header = json.loads(file.read(length), object_pairs_hook=_no_name_twice)
        with safe_open(path, framework="pt", device="cpu") as parsed:
            names = set(parsed.keys())
    except (struct.error, ValueError, SafetensorError, OSError, RecursionError) as error:
        raise SecateurError(_damaged(path, str(error))) from None
    header.pop("__metadata__", None)
    if names != set(header):
        raise SecateurError(_damaged(path, "its header cannot be read the same way twice"))
    base = 8 + length
    entries = {}
    for name, info in header.items():
        start, stop = info["data_offsets"]
        entries[name] = Entry(path.name, info["dtype"], tuple(info["shape"]), base + start, base + stop)
    return entries


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two parsers may disagree on which of two entries with one name counts."""
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("its header has a name twice")
    return dict(pairs)


def _damaged(path: Path, found: str) -> str:
    return f"{path} is truncated or not a safetensors file: {found}.\n  Download or export it again."


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises SecateurError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SecateurError(f"{path.parent} has no {path.name}: expected a Hugging Face model folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SecateurError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise SecateurError(f"{path}: expected a JSON object")
    return content


def to_bytes(tensor: Tensor, dtype: str) -> memoryview:
    """The tensor's bytes as a shard stores them, rounded to the stored dtype."""
    stored = tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
    return memoryview(stored.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
