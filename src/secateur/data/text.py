"""Text from files: plain or JSON Lines, UTF-8, never a pickle."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from secateur.data.tensors import TENSOR_SUFFIXES, check_exists
from secateur.errors import SecateurError

JSON_SUFFIXES = {".jsonl", ".json", ".ndjson"}
FIELDS = ("text", "content", "document", "body")  # guessed in this order

LONGEST = 1 << 24  # bytes of a text that are read: some four million tokens

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


def load_text(source: Path, field: str | None) -> tuple[str, str]:
    """The text of a file, or of its first LONGEST bytes, and a note for people on what was read.

    JSON Lines (.jsonl, .ndjson, .json): one object per line, its `field` taken, documents joined by blank lines.
    Without `field`: the first of FIELDS that holds text, or else the field with the most characters; the note says
    which. Any other file is plain UTF-8 text.

    Raises SecateurError when the file is missing, empty, not UTF-8 (naming the byte), of a kind that is refused
    (compressed, pickled), or when a line is not JSON, lacks the field or holds something else in it (naming the line).
    """
    text, part = _read(source)
    if source.suffix.lower() in JSON_SUFFIXES:
        documents, note = _documents(source, _parse(source, text), field)
        return documents, part + note
    if field is not None:
        raise SecateurError(
            f"{source} is read as plain text and has no field {field!r}; leave --field out, or give JSON Lines."
        )
    return text, part + source.name


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


def _read(path: Path) -> tuple[str, str]:
    """The text, and a note where that is not all of it."""
    raw, part = _open(path)
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
    return _newlines(text.removeprefix("\ufeff")), part


def _open(path: Path) -> tuple[bytes, str]:
    """The bytes, up to the last whole line of the first LONGEST, and a note where that is not all of them."""
    check_exists(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST + 1)
    except OSError as error:
        raise SecateurError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None
    if len(raw) <= LONGEST:
        return raw, ""
    raw = raw[: max(raw.rfind(b"\n", 0, LONGEST), raw.rfind(b" ", 0, LONGEST) if b"\n" not in raw else 0) + 1]
    return raw, f"the first {len(raw) / 1e6:.0f} MB of "


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
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
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
