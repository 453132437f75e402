"""Where calibration and evaluation inputs come from: text, saved tensors, or any iterable of batches.

It knows files and tokenizers, and nothing of models beyond the names of their forward's arguments.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError

Batch = Mapping[str, Tensor]  # keyword arguments of the model's forward; or INPUT alone or with TARGET
INPUT, TARGET = "*input", "*target"  # what a model takes by position, and its label: no argument can bear these names

TENSOR_SUFFIXES = {".safetensors", ".npz", ".npy"}
JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
FIELDS = ("text", "content", "document", "body")  # guessed in this order
TOKEN_IDS = ("input_ids", "decoder_input_ids")

_PICKLE = (
    "is a pickle or an archive. Never unpickle untrusted files (loading can run code): save as .safetensors or .npz"
)
_COMPRESSED = "is compressed; decompress it first (gunzip, bunzip2, unxz, unzstd)"
_PARQUET = "is a Parquet file; write it out as JSON Lines (one object per line, .jsonl)"
_TENSORS = "holds tensors, and text is expected: a UTF-8 file or JSON Lines (.jsonl)"
REFUSED: tuple[tuple[set[str], tuple[bytes, ...], str], ...] = (  # suffixes, first bytes, why not
    ({".gz", ".bz2", ".xz", ".zst"}, (b"\x1f\x8b", b"BZh91AY", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"), _COMPRESSED),
    (
        {".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".zip"},
        (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"),
        _PICKLE,
    ),
    ({".parquet"}, (b"PAR1",), _PARQUET),
    (TENSOR_SUFFIXES, (b"\x93NUMPY",), _TENSORS),
)


class Tokenizer(Protocol):
    """Any tokenizer of transformers."""

    def encode(self, text: str, /, *, add_special_tokens: bool, verbose: bool) -> list[int]: ...


@dataclass(frozen=True)
class Data:
    """Batches in memory, in the order in which the model sees them.

    description: where they come from, for people. digest: sha256 of the contents, see `digest`.
    tokens: how many token ids `input_ids` hold over all batches (padding too); 0 for inputs without token ids.
    """

    batches: Sequence[Batch]
    description: str
    digest: str
    tokens: int


def calibration(
    source: str | Path | None,
    tokenizer: Tokenizer | None,
    *,
    samples: int,
    length: int,
    seed: int | None,
    field: str | None = None,
    encoder_decoder: bool = False,
    vocab_size: int | None = None,
) -> Data:
    """`samples` batches of one sample each, from a text file, JSON Lines, saved tensors, or the text we ship (None).

    Text gives {"input_ids": [1, length] int64}, with the same ids as "decoder_input_ids" for an encoder-decoder.
    Saved tensors (.safetensors and .npz keyed by forward argument, .npy = input_ids; first dimension = sample) keep
    their own length. The same seed takes the same samples; None takes evenly spaced ones. field: of JSON Lines.

    Raises SecateurError when the source cannot be read, is too small, or holds token ids outside 0..vocab_size - 1.
    """
    _at_least_one(samples=samples, length=length)
    path = None if source is None else Path(source)
    if path is not None and path.suffix.lower() in TENSOR_SUFFIXES:
        tensors = _load_tensors(path)
        available = len(next(iter(tensors.values())))
        if available < samples:
            less = f", or ask for less: --samples {available}" if available else ""
            raise SecateurError(f"{path} holds {available} samples; {samples} are needed. Save more{less}.")
        chosen = _choose(available, samples, seed)
        batches = [{key: tensor[i : i + 1].clone() for key, tensor in tensors.items()} for i in chosen]
        description = f"{samples} of the {available} samples of {path.name}, {_how(seed)}"
    else:
        text, note = bundled_text() if path is None else load_text(path, field)
        if tokenizer is None:
            raise SecateurError(
                f"the model's folder has no tokenizer, and {note} is text. Give pre-tokenized tensors: .safetensors or "
                ".npz keyed by argument name, or .npy with the input_ids [samples, length]."
            )
        cut = _cut(text, tokenizer, length, samples, seed, note)
        batches = [{"input_ids": window[None]} for window in cut]
        description = f"{samples} windows of {length} tokens of {note}, {_how(seed)}"
    if encoder_decoder:
        batches = [_with_decoder_ids(batch) for batch in batches]
    return _data(batches, description, vocab_size)


def holdout(
    source: str | Path | None, tokenizer: Tokenizer, *, samples: int, length: int, count: int, field: str | None = None
) -> list[Tensor]:
    """Up to `count` windows of a text that `calibration` with seed None does not take: [1, length] int64 each.

    Evenly spaced among the windows that are left; none when calibration takes them all.
    """
    text, _ = bundled_text() if source is None else load_text(Path(source), field)
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    whole = len(ids) // length
    taken = set(_choose(whole, samples, None)) if samples else set()
    free = [index for index in range(whole) if index not in taken]
    chosen = [free[place] for place in _choose(len(free), min(count, len(free)), None)]
    return [torch.tensor([ids[index * length : (index + 1) * length]]) for index in chosen]


def from_iterable(batches: Iterable[Any], limit: int | None, vocab_size: int | None = None) -> Data:
    """The first `limit` batches (None: all) of anything that yields batches, such as a DataLoader; consumed once.

    A batch is a mapping of tensors (keyword arguments), a tensor, or a tuple or list (input, label, ...); the last two
    become {INPUT: input} and {INPUT: input, TARGET: label}, where a label that is no tensor is dropped. Tensors are
    detached and not copied.

    Raises SecateurError when there are none, an item is something else, a floating-point input has NaN or infinity, or
    a token id is outside 0..vocab_size - 1.
    """
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        found = f"a single {type(batches).__name__}"
        raise SecateurError(f"the data is {found}; an iterable of batches is expected. Wrap one batch in a list.")
    if limit is not None:
        _at_least_one(limit=limit)
    taken = [_as_batch(item, f"batch {index}") for index, item in enumerate(islice(batches, limit))]
    if not taken:
        raise SecateurError("the data yields no batches (a generator that was used up?); give at least one.")
    return _data(taken, f"{len(taken)} batches, the first {_shapes(taken[0])}", vocab_size)


def call(model: nn.Module, batch: Batch | Tensor | Sequence[Any], **options: Any) -> Any:
    """model(**batch) for a mapping; model(x) for a tensor x, for (x, label) and for what `from_iterable` made of them.

    options: further keyword arguments, such as use_cache=False. Raises SecateurError when the batch is something else.
    """
    batch = _as_batch(batch, "the batch")
    return model(batch[INPUT], **options) if INPUT in batch else model(**batch, **options)


def windows(text: str, tokenizer: Tokenizer, length: int, count: int, *, seed: int | None) -> Tensor:
    """`count` windows of `length` tokens, in the order of the text: [count, length] int64.

    The text is encoded as one string without special tokens and cut into k whole windows. seed None takes window
    (i * k) // count for i = 0..count - 1; otherwise a seeded sample without replacement.

    Raises SecateurError when k < count.
    """
    _at_least_one(length=length, count=count)
    return _cut(text, tokenizer, length, count, seed, "the text")


def load_text(source: Path, field: str | None) -> tuple[str, str]:
    """The text of a file, and a note for people on what was read.

    JSON Lines (.jsonl, .ndjson, .json): one object per line, its `field` taken, documents joined by blank lines.
    Without `field`: the first of FIELDS that holds text, or else the field with the most characters; the note says
    which. Any other file is plain UTF-8 text.

    Raises SecateurError when the file is missing, empty, not UTF-8 (naming the byte), of a kind that is refused
    (compressed, pickled), or when a line is not JSON, lacks the field or holds something else in it (naming the line).
    """
    text = _read(source)
    if source.suffix.lower() in JSON_SUFFIXES:
        return _documents(source, _parse(source, text), field)
    if field is not None:
        raise SecateurError(
            f"{source} is read as plain text and has no field {field!r}; leave --field out, or give JSON Lines."
        )
    return text, source.name


def bundled_text() -> tuple[str, str]:
    """The text that ships with the package, its files joined by blank lines in the order of their names, and a note.

    Raises SecateurError when the installation lacks it.
    """
    folder = files("secateur") / "text"
    found = [file for file in folder.iterdir() if file.name.endswith(".txt")] if folder.is_dir() else []
    if not found:
        raise SecateurError(f"secateur's own text is missing from {folder}; reinstall secateur, or give a text file.")
    parts = [file.read_bytes().decode("utf-8") for file in sorted(found, key=lambda file: file.name)]
    return "\n\n".join(_newlines(part) for part in parts), "the text that ships with secateur"


def digest(batches: Iterable[Batch]) -> str:
    """sha256, in hex, over the batches in order: of each its keys (sorted), dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for batch in batches:
        sha.update(f"batch of {len(batch)};".encode())
        for key, tensor in sorted(batch.items()):
            sha.update(repr((key, str(tensor.dtype), tuple(tensor.shape))).encode())
            sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


# Choosing


def _cut(text: str, tokenizer: Tokenizer, length: int, count: int, seed: int | None, name: str) -> Tensor:
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    whole = len(ids) // length
    if whole < count:
        less = [f"--samples {whole}"] if whole else []
        less += [f"--length {len(ids) // count}"] if len(ids) >= count else []
        raise SecateurError(
            f"{name} has {len(ids):,} tokens, which make {whole} whole windows of {length}; {count} are needed. "
            f"Give more text{', or ask for less: ' if less else ''}{' or '.join(less)}."
        )
    return torch.tensor(ids[: whole * length], dtype=torch.int64).view(whole, length)[_choose(whole, count, seed)]


def _choose(available: int, count: int, seed: int | None) -> list[int]:
    if seed is None:
        return [(i * available) // count for i in range(count)]
    generator = torch.Generator().manual_seed(seed)
    return sorted(torch.randperm(available, generator=generator)[:count].tolist())


def _how(seed: int | None) -> str:
    return "evenly spaced" if seed is None else f"sampled with seed {seed}"


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise SecateurError(f"{name} is {number}; expected 1 or more.")


# Reading text


def _read(path: Path) -> str:
    raw = _open(path)
    for suffixes, starts, reason in REFUSED:
        if path.suffix.lower() in suffixes or raw.startswith(starts):
            raise SecateurError(f"{path} {reason}.")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SecateurError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{raw[error.start]:02x} ({error.reason}). "
            "Save it as UTF-8."
        ) from None
    if not text.strip("\ufeff \t\r\n"):
        raise SecateurError(f"{path} is empty ({len(raw)} bytes, no text); give a file with text.")
    return _newlines(text.removeprefix("\ufeff"))


def _open(path: Path) -> bytes:
    _exists(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise SecateurError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None


def _exists(path: Path) -> None:
    if not path.exists():
        raise SecateurError(f"{path} does not exist; give a text file, JSON Lines or saved tensors.")
    if path.is_dir():
        raise SecateurError(f"{path} is a folder; name one file in it.")


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _parse(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    """Line number, object. Lines end in a newline only: JSON strings may hold what str.splitlines cuts at."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SecateurError(
                f"{path}, line {number} is not valid JSON: {error}. Expected one object per line; "
                "`jq -c '.[]' FILE` turns an array into that."
            ) from None
        if not isinstance(row, dict):
            raise SecateurError(
                f"{path}, line {number} holds {_kind(row)}; expected an object such as {{'text': '...'}}. "
                "`jq -c '.[]' FILE` turns an array into one object per line."
            )
        rows.append((number, row))
    return rows


def _documents(path: Path, rows: list[tuple[int, dict[str, Any]]], field: str | None) -> tuple[str, str]:
    name, how = (field, "") if field is not None else _guess(path, rows)
    documents = []
    for number, row in rows:
        if name not in row:
            present = ", ".join(map(repr, row)) or "none"
            raise SecateurError(
                f"{path}, line {number} has no field {name!r}; its fields: {present}. Name one: --field."
            )
        value = row[name]
        if not isinstance(value, str):
            raise SecateurError(
                f"{path}, line {number}: field {name!r} holds {_kind(value)}; expected a string of text."
            )
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise SecateurError(f"{path}, line {number}: field {name!r} holds half a surrogate pair; remove it.")
        documents.append(value)
    documents = [_newlines(document) for document in documents if document.strip()]
    if not documents:
        raise SecateurError(f"{path}: field {name!r} is empty in all {len(rows)} lines; name another: --field.")
    return "\n\n".join(documents), f"{path.name} (field {name!r}{how}, {len(documents)} documents)"


def _guess(path: Path, rows: list[tuple[int, dict[str, Any]]]) -> tuple[str, str]:
    characters: dict[str, int] = {}
    for _, row in rows:
        for name, value in row.items():
            if isinstance(value, str):
                characters[name] = characters.get(name, 0) + len(value)
    if not characters:
        present = ", ".join(sorted({repr(name) for _, row in rows for name in row})) or "none"
        raise SecateurError(
            f"{path} has no field with a string in it; its fields: {present}. Write the text into 'text'."
        )
    known = next((name for name in FIELDS if characters.get(name)), None)
    if known is not None:
        return known, ", guessed by its name"
    return max(characters, key=lambda name: characters[name]), ", guessed: the most text"


def _kind(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "an array", str: "a string", bool: "a truth value"}
    return names.get(type(value), "a number")


# Reading tensors


def _load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by argument name, all with the same first dimension."""
    _exists(path)
    tensors = _load_safetensors(path) if path.suffix.lower() == ".safetensors" else _load_numpy(path)
    if not tensors:
        raise SecateurError(f"{path} holds no tensors; expected one for each argument of the model's forward.")
    shapes = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in tensors.items())
    if any(tensor.ndim == 0 for tensor in tensors.values()) or len({len(tensor) for tensor in tensors.values()}) > 1:
        raise SecateurError(f"{path}: the first dimension must be the sample, equal for all tensors; found {shapes}.")
    return {key: _token_ids(path, key, tensor) if key in TOKEN_IDS else tensor for key, tensor in tensors.items()}


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SecateurError(f"{path} is not a valid safetensors file: {error}. Write it again.") from None


def _load_numpy(path: Path) -> dict[str, Tensor]:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"input_ids": loaded} if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "pickle" in str(error):
            raise SecateurError(
                f"{path} holds pickled objects. Never unpickle untrusted files (loading can run code): save arrays of "
                "numbers as .safetensors or .npz."
            ) from None
        raise SecateurError(f"{path} is not a valid NumPy file: {error}. Write it again.") from None
    try:
        return {key: torch.from_numpy(array) for key, array in arrays.items()}
    except (TypeError, ValueError):
        found = ", ".join(f"{key} {array.dtype}" for key, array in arrays.items())
        raise SecateurError(
            f"{path}: torch cannot hold these arrays ({found}); save numbers in native order."
        ) from None


def _token_ids(path: Path, key: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tensor.ndim < 2:
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise SecateurError(f"{path}: {key} is {found}; expected integers of shape [samples, length].")
    return tensor.long()


# Checking and describing


def _as_batch(item: Any, name: str) -> Batch:
    if isinstance(item, Tensor):
        return {INPUT: item.detach()}
    if isinstance(item, Mapping):
        wrong = next((key for key, value in item.items() if not isinstance(value, Tensor)), None)
        if wrong is not None or not item:
            found = f"{type(item[wrong]).__name__} under {wrong!r}" if item else "an empty mapping"
            raise SecateurError(f"{name} holds {found}; expected tensors by argument name (try torch.as_tensor).")
        return {str(key): value.detach() for key, value in item.items()}
    if isinstance(item, (tuple, list)) and len(item) > 0 and isinstance(item[0], Tensor):
        label = {TARGET: item[1].detach()} if len(item) > 1 and isinstance(item[1], Tensor) else {}
        return {INPUT: item[0].detach(), **label}
    found = f"a {type(item).__name__}"
    found += f" of {type(item[0]).__name__}" if isinstance(item, (tuple, list)) and item else ""
    raise SecateurError(f"{name} is {found}; expected a mapping of tensors, a tensor, or (input, label) of tensors.")


def _with_decoder_ids(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    if "input_ids" not in batch or "decoder_input_ids" in batch:
        return batch
    return {**batch, "decoder_input_ids": batch["input_ids"]}


def _data(batches: Sequence[Batch], description: str, vocab_size: int | None = None) -> Data:
    for index, batch in enumerate(batches):
        for key, tensor in batch.items():
            if not _finite(key, tensor):
                raise SecateurError(
                    f"batch {index}: {key.removeprefix('*')} holds NaN or infinity; every value must be finite. "
                    "Check the preprocessing."
                )
            if vocab_size is not None and key in TOKEN_IDS:
                _check_vocabulary(tensor, vocab_size, f"batch {index}: {key}")
    tokens = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
    return Data(batches, description, digest(batches), tokens)


def _finite(key: str, tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wrong = tensor.isnan() if key.endswith("mask") else ~tensor.isfinite()  # additive masks hold -inf by design
    return not wrong.any()


def _check_vocabulary(ids: Tensor, vocab_size: int, name: str) -> None:
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if len(outside):
        raise SecateurError(
            f"{name} holds token id {int(outside[0])}; the model's vocabulary has {vocab_size:,} ids, 0 to "
            f"{vocab_size - 1}. Use the tokenizer this model was trained with."
        )


def _shapes(batch: Batch) -> str:
    parts = (
        f"{key.removeprefix('*')} {list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for key, t in batch.items()
    )
    return ", ".join(parts)
