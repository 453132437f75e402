"""Write the result so that it is whole or not there: a staging folder, a journal, and one rename at the end.

The staging folder `<out>.partial` starts as a copy of the shards; pruned tensors replace theirs in place, a block at a
time, and the journal then says so. A run killed at any moment goes on at the first block that the journal lacks; what it
had half written is written again from the source. Shards carry another name until the end.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from secateur.errors import SecateurError
from secateur.stream.checkpoint import Checkpoint, to_bytes

JOURNAL = "journal.jsonl"
UNFINISHED = ".partial"
CHUNK = 1 << 24  # bytes copied at a time


class Staging:
    """The unfinished result of one run. Every byte that it writes passes `_write`."""

    def __init__(self, source: Checkpoint, out: Path, settings: Mapping[str, Any], resume: bool) -> None:
        """settings: what makes the result what it is; a resumed run has to agree with it."""
        self.source, self.out = source, out
        self.folder = out.with_name(out.name + UNFINISHED)
        self.records: list[dict[str, Any]] = []
        self._lock: IO[bytes] | None = None
        self._journal: IO[bytes] | None = None
        self._files: dict[str, IO[bytes]] = {}
        if self.folder.exists() and not resume:
            raise SecateurError(
                f"{self.folder} holds an unfinished run. Go on with --resume, or delete that folder to start afresh."
            )
        self._start(dict(settings))

    def _start(self, settings: dict[str, Any]) -> None:
        with explain_full_disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            lines = self._read_journal()
            if lines and lines[0].get("settings") != settings:
                changed = sorted(k for k in settings if lines[0].get("settings", {}).get(k) != settings[k])
                raise SecateurError(
                    f"{self.folder} was begun with other settings ({', '.join(changed)} differ).\n"
                    "  Resume with the same ones, or delete that folder to start afresh."
                )
            self._journal = (self.folder / JOURNAL).open("ab")
            if not lines:
                self._need_room()
                self._append({"settings": settings})
            self.records = lines[1:]
            copied = {record["copied"] for record in self.records if "copied" in record}
            for shard in self.source.shards:
                if shard not in copied:
                    self._copy(shard)
                self._files[shard] = self._staged(shard).open("r+b")

    @property
    def resumed(self) -> bool:
        """Whether an earlier run got as far as a block."""
        return any("block" in record for record in self.records)

    def record(self, kind: str, key: Any = None) -> dict[str, Any] | None:
        """The journal's record of a kind ("block", "allocation"), or None; key: the record's value under that kind."""
        found = (r for r in self.records if kind in r and (key is None or r[kind] == key))
        return next(found, None)

    def note(self, record: dict[str, Any]) -> None:
        """Add a record that a resumed run will find."""
        with explain_full_disk(self.folder):
            self._append(record)

    def save(self, block: str, tensors: Mapping[str, Tensor], report: dict[str, Any]) -> None:
        """Replace tensors in the staged shards, then note that the block is done, in that order on the disk."""
        with explain_full_disk(self.folder):
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
            for shard in touched:
                _sync(self._files[shard])
            self._append({"block": block, **report})

    def read(self, checkpoint_name: str) -> Path:
        """The staged shard that holds a tensor."""
        return self._staged(self.source.entries[checkpoint_name].shard)

    def assemble(self, files: Mapping[str, bytes], copies: Iterable[str]) -> Path:
        """Give the shards their names and put the other files beside them. Returns the folder, whole but not yet named."""
        with explain_full_disk(self.folder):
            for shard, file in self._files.items():
                file.close()
                if self._staged(shard).exists():
                    os.replace(self._staged(shard), self.folder / shard)
            self._files.clear()
            for name in copies:
                self.add(name, (self.source.folder / name).read_bytes())
            for name, content in files.items():
                self.add(name, content)
        return self.folder

    def reopen(self) -> None:
        """Take the shards' names back after a failed check, so that nothing looks whole."""
        for shard in self.source.shards:
            if (self.folder / shard).exists():
                os.replace(self.folder / shard, self._staged(shard))

    def add(self, name: str, content: bytes) -> None:
        """Write a small file in one step."""
        path = self.folder / name
        temporary = path.with_name(name + ".tmp")
        with explain_full_disk(self.folder):
            with temporary.open("wb") as file:
                self._write(file, memoryview(content))
                _sync(file)
            os.replace(temporary, path)

    def finish(self) -> None:
        """The last step: the folder gets its name."""
        self.close()
        (self.folder / JOURNAL).unlink(missing_ok=True)
        (self.folder / ".lock").unlink(missing_ok=True)
        os.replace(self.folder, self.out)
        _sync_folder(self.out.parent)

    def close(self) -> None:
        """Let go of all files; the staging folder stays for a later run."""
        for file in (*self._files.values(), self._journal, self._lock):
            if file is not None:
                file.close()
        self._files.clear()

    def _staged(self, shard: str) -> Path:
        return self.folder / (shard + UNFINISHED)

    def _take_lock(self) -> None:
        self._lock = (self.folder / ".lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SecateurError(
                f"another run is writing to {self.folder}; wait for it, or choose another --out"
            ) from None

    def _read_journal(self) -> list[dict[str, Any]]:
        """All whole records; a torn last line is cut off."""
        path = self.folder / JOURNAL
        if not path.exists():
            return []
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):
            os.truncate(path, len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def _append(self, record: dict[str, Any]) -> None:
        assert self._journal is not None
        self._write(self._journal, memoryview(json.dumps(record).encode() + b"\n"))
        _sync(self._journal)
        self.records.append(record)

    def _need_room(self) -> None:
        free, needed = shutil.disk_usage(self.folder).free, self.source.bytes
        if free < needed * 1.02:
            raise SecateurError(
                f"the disk under {self.folder} has {free / 1e9:.2f} GB free, the result needs {needed / 1e9:.2f} GB.\n"
                "  Free some room or choose an --out on another disk."
            )

    def _copy(self, shard: str) -> None:
        done = self.folder / shard  # an earlier run may have given it its name already
        if done.exists():
            os.replace(done, self._staged(shard))
        with (self.source.folder / shard).open("rb") as source, self._staged(shard).open("wb") as target:
            while chunk := source.read(CHUNK):
                self._write(target, memoryview(chunk))
            _sync(target)
        self._append({"copied": shard})

    @staticmethod
    def _write(file: IO[bytes], data: memoryview) -> None:
        file.write(data)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class explain_full_disk:
    """Turn a failed write into the one error that a user sees."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            found = "the disk is full" if full else str(error)
            raise SecateurError(
                f"cannot write to {self.folder}: {found}.\n  Nothing is lost: make room and run again with --resume."
            ) from None
