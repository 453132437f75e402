"""What a run goes on from: tensors and numbers in one safetensors file, whole or not there, never a pickle; and a folder
that nobody else writes to.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import SecateurError

LOCK = ".lock"


def write_state(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    """told: what JSON can hold. What was there before stays until the new file is whole."""
    partial = path.with_name(f"{path.name}.partial")
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    try:
        save_file(own, partial, metadata={"state": json.dumps(told)})
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_state(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_state` wrote. Raises SecateurError when the file is none of it. what: for the message."""
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["state"])
            return {name: file.get_tensor(name) for name in file.keys()}, told  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise SecateurError(f"{path} {what}: {error}") from None


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class disk:
    """Turns what a disk says into one clear error."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or isinstance(error, (OSError, SafetensorError)):
            why = "the disk is full" if full or "No space" in str(error) else str(error)
            raise SecateurError(
                f"cannot write to {self.place}: {why}. What was there before is whole; make room and go on with resume."
            ) from None


def begun(folder: Path) -> bool:
    """Whether something in the folder is whole: a run that was killed at once has left nothing to go on from."""
    return any(entry.name != LOCK and not entry.name.endswith(".partial") for entry in folder.iterdir())


def locked(file: IO[bytes]) -> bool:
    """Whether nobody else holds the file; it is ours until it is closed, or the process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)  # other errors: no locks on this file system
    return True


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raises SecateurError where another run writes to the folder."""
    with disk(folder):
        file = (folder / LOCK).open("ab")
    with file:
        if not locked(file):
            raise SecateurError(f"another run is writing to {folder}; wait for it, or choose another --out")
        yield
