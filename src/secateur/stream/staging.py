"""Write the result so that it is whole or not there: a staging folder, a journal, and one rename at the end.

The staging folder `<out>.partial` starts as a copy of the shards; pruned tensors replace theirs in place, a block at a
time, and the journal then says so. A run killed at any moment goes on at the first block that the journal lacks; what it
had half written is written again from the source. Shards carry another name until all blocks are done; then they move
into a folder inside the staging folder, where the result is verified and from where it is renamed to `<out>`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from secateur.errors import SecateurError
from secateur.state import locked
from secateur.stream.checkpoint import Checkpoint, to_bytes

JOURNAL = "journal.jsonl"
UNFINISHED = ".partial"
WHOLE = "unverified"  # where the result is put together, inside the staging folder
CHUNK = 1 << 24  # bytes copied at a time


def staging_folder(out: Path) -> Path:
    """Where the unfinished result lies."""
    return out.with_name(out.name + UNFINISHED)


class Staging:
    """The unfinished result of one run. Every byte that it writes passes `_write`."""

    def __init__(self, source: Checkpoint, out: Path, settings: Mapping[str, Any], resume: bool) -> None:
        """settings: what makes the result what it is; a resumed run has to agree with it. Raises SecateurError."""
        self.source, self.out = source, out
        self.folder = staging_folder(out)
        self.records: list[dict[str, Any]] = []
        self._journal: IO[bytes] | None = None
        self._files: dict[str, IO[bytes]] = {}
        plain = json.loads(json.dumps(settings))
        with explain(self.folder):
            self._own(resume)
            try:
                found = self._agreed(plain)
            except BaseException:
                self._unlock()  # what lies there is another run's: nothing of it is touched
                raise
            try:
                self._begin(plain, found)
            except BaseException as error:
                self.close(failed=isinstance(error, Exception))
                raise

    def _own(self, resume: bool) -> None:
        """Make the folder, or enter the one that is there, and lock it: the lock is on the journal."""
        try:
            self.folder.mkdir(parents=True)
        except FileExistsError:
            if not resume:
                raise SecateurError(self._in_the_way()) from None
        path = self.folder / JOURNAL
        journal = path.open("ab", buffering=0)
        # whoever had it may have finished, and removed it, between the opening and the lock
        if not locked(journal) or not path.exists() or not os.path.samestat(os.fstat(journal.fileno()), path.stat()):
            journal.close()
            raise SecateurError(self._busy())
        self._journal = journal

    def _in_the_way(self) -> str:
        if not self.folder.is_dir():
            return f"{self.folder} is in the way of the unfinished result; move it, or choose another --out"
        path = self.folder / JOURNAL
        if path.is_file():
            with path.open("rb") as journal:
                if not locked(journal):
                    return self._busy()
        return f"{self.folder} holds an unfinished run. Go on with --resume, or delete that folder to start afresh."

    def _busy(self) -> str:
        return f"another run is writing to {self.folder}; wait for it, or choose another --out"

    def _agreed(self, settings: dict[str, Any]) -> list[dict[str, Any]]:
        """The journal of an unfinished run with the same settings; empty when there is none."""
        if os.path.lexists(self.out):
            raise SecateurError(f"{self.out} exists already; choose another --out, or delete it")
        lines = self._read_journal()
        if lines and lines[0]["settings"] != settings:
            found = "\n    ".join(_differences(lines[0]["settings"], settings))
            raise SecateurError(
                f"{self.folder} was begun with other settings:\n    {found}\n"
                "  Resume with the same ones, or delete that folder to start afresh."
            )
        return lines

    def _begin(self, settings: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        """Go on where the journal ends, or start afresh."""
        self._take_apart()
        copied = {line["copied"] for line in lines if "copied" in line}
        if not lines or not all(self._intact(shard) for shard in copied):
            self._need_room()
            os.truncate(self.folder / JOURNAL, 0)
            lines, copied = [], set()
            self._append({"settings": settings})
        self.records = lines[1:]
        for shard in self.source.shards:
            if shard not in copied:
                self._copy(self.source.folder / shard, self._staged(shard))
                self._append({"copied": shard})
            self._files[shard] = self._staged(shard).open("r+b", buffering=0)

    def record(self, kind: str, key: Any = None) -> dict[str, Any] | None:
        """The journal's record of a kind ("block", "allocation"), or None; key: the record's value under that kind."""
        found = (r for r in self.records if kind in r and (key is None or r[kind] == key))
        return next(found, None)

    def note(self, record: dict[str, Any]) -> None:
        """Add a record that a resumed run will find."""
        with explain(self.folder):
            self._append(record)

    def save(self, block: str, tensors: Mapping[str, Tensor], report: dict[str, Any]) -> None:
        """Replace tensors in the staged shards, then note that the block is done, in that order on the disk."""
        with explain(self.folder):
            touched = set()
            for name, tensor in tensors.items():
                entry = self.source.entries[name]
                data = to_bytes(tensor, entry.dtype)
                if len(data) != entry.stop - entry.start:
                    raise SecateurError(f"{name}: has {len(data)} bytes, its place has {entry.stop - entry.start}")
                file = self._files[entry.shard]
                file.seek(entry.start)
                self._write(file, data)
                touched.add(entry.shard)
            for shard in sorted(touched):
                os.fsync(self._files[shard].fileno())
            self._append({"block": block, **report})

    def read(self, checkpoint_name: str) -> Path:
        """The staged shard that holds a tensor."""
        return self._staged(self.source.entries[checkpoint_name].shard)

    def assemble(self, files: Mapping[str, bytes], copies: Iterable[str]) -> Path:
        """Give the shards their names and put the other files beside them. Returns the folder, whole but not verified."""
        with explain(self.folder):
            self._let_go()
            whole = self.folder / WHOLE
            whole.mkdir()
            for shard in self.source.shards:
                os.replace(self._staged(shard), whole / shard)
            for name in copies:
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                self._copy(self.source.folder / name, whole / name)
            for name, content in files.items():
                self.add(name, content)
        return whole

    def add(self, name: str, content: bytes) -> None:
        """Write a small file into the assembled result."""
        with explain(self.folder), (self.folder / WHOLE / name).open("wb", buffering=0) as file:
            self._write(file, memoryview(content))
            os.fsync(file.fileno())

    def finish(self) -> None:
        """The last step: the result gets its name."""
        with explain(self.folder):
            _sync_folder(self.folder / WHOLE)
            if os.path.lexists(self.out):
                raise SecateurError(
                    f"{self.out} came into being while this run went on; nothing is overwritten.\n"
                    "  Move it away and run again with --resume."
                )
            os.replace(self.folder / WHOLE, self.out)
        with contextlib.suppress(OSError):  # the result is there; nothing that fails from now on is of account
            _sync_folder(self.out.parent)
            (self.folder / JOURNAL).unlink()
            self.folder.rmdir()
        self.close()

    def close(self, failed: bool = False) -> None:
        """Let go of all files. The staging folder stays for a later run; after a failure only when blocks are done."""
        self._let_go()
        if self._journal is None:
            return
        with contextlib.suppress(OSError):
            self._take_apart()
            if failed and not any("block" in record or "allocation" in record for record in self.records):
                self._remove()
        self._unlock()

    def _unlock(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _remove(self) -> None:
        """Delete what a run puts into its staging folder, and nothing else that may lie there."""
        for shard in self.source.shards:
            self._staged(shard).unlink(missing_ok=True)
        (self.folder / JOURNAL).unlink(missing_ok=True)
        self.folder.rmdir()

    def _take_apart(self) -> None:
        """Undo `assemble`, so that nothing looks whole."""
        whole = self.folder / WHOLE
        for shard in self.source.shards:
            if (whole / shard).exists():
                os.replace(whole / shard, self._staged(shard))
        if whole.exists():
            shutil.rmtree(whole)

    def _let_go(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _staged(self, shard: str) -> Path:
        return self.folder / (shard + UNFINISHED)

    def _intact(self, shard: str) -> bool:
        path = self._staged(shard)
        return path.is_file() and path.stat().st_size == (self.source.folder / shard).stat().st_size

    def _read_journal(self) -> list[dict[str, Any]]:
        """All whole records, the settings first; what follows a torn line is cut off, and will be done again."""
        path = self.folder / JOURNAL
        lines: list[dict[str, Any]] = []
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                break
            if not isinstance(record, dict) or ("settings" in record) != (not lines):
                break
            lines.append(record)
            whole += len(line)
        os.truncate(path, whole)
        return lines

    def _append(self, record: dict[str, Any]) -> None:
        assert self._journal is not None
        self._write(self._journal, memoryview(json.dumps(record).encode() + b"\n"))
        os.fsync(self._journal.fileno())
        self.records.append(record)

    def _need_room(self) -> None:
        free, needed = shutil.disk_usage(self.folder).free, self.source.bytes
        if free < needed * 1.02:
            raise SecateurError(
                f"the disk under {self.folder} has {free / 1e9:.2f} GB free, the result needs {needed / 1e9:.2f} GB.\n"
                "  Free some room or choose an --out on another disk."
            )

    def _copy(self, source: Path, target: Path) -> None:
        with source.open("rb") as read, target.open("wb", buffering=0) as written:
            while chunk := read.read(CHUNK):
                self._write(written, memoryview(chunk))
            os.fsync(written.fileno())
        _sync_folder(target.parent)

    @staticmethod
    def _write(file: IO[bytes], data: memoryview) -> None:
        while data:  # an unbuffered file may take less than it is given
            data = data[file.write(data) :]


def _differences(then: Any, now: Any, path: str = "") -> list[str]:
    """What two settings disagree on, for people."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted(then.keys() | now.keys())
        return [line for k in keys for line in _differences(then.get(k), now.get(k), f"{path}.{k}".lstrip("."))]
    return [] if then == now else [f"{path}: {_short(then)} then, {_short(now)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:20]}..."


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain(folder: Path) -> Iterator[None]:
    """Turn a failed write into the one error that a user sees."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        found = "the disk is full" if full else str(error)
        way_out = "make room" if full else "see to that"
        raise SecateurError(
            f"cannot write to {folder}: {found}.\n  Nothing is lost: {way_out} and run again with --resume."
        ) from None
