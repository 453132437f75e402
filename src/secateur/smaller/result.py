"""The folder of a result: unfinished under a name of its own until everything in it was verified."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from secateur.card import environment
from secateur.errors import SecateurError
from secateur.smaller.request import Shrunk, Smaller
from secateur.stream.checkpoint import INDEX, needs_ours
from secateur.stream.staging import explain, staging_folder


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A new folder for the unfinished result, which is gone when anything is raised."""
    staging = staging_folder(out)
    if os.path.lexists(staging):
        raise SecateurError(f"{staging} holds an unfinished run; delete that folder, or choose another --out")
    with explain(staging.parent):
        staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def check_whole(folder: Path) -> None:
    """Raises SecateurError for a folder whose config does not say its shapes: it was cut before."""
    if needs_ours(folder):
        raise SecateurError(
            f"{folder} was cut by secateur before, and its config does not say its shapes: it cannot be cut again.\n"
            "  Cut the original, with both requests in one: --remove takes several."
        )


def finish(staging: Path, out: Path, found: Shrunk, wanted: Smaller, folder: Path, others: Iterable[str] = ()) -> None:
    """Whatever else belongs to the model, the recipe and the figures, and the name. others: files of the model's folder."""
    for name in others:
        if name != INDEX and not (staging / name).exists():  # the index of shards that are no more
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, staging / name)
    manifest = json.loads((staging / "secateur.json").read_text(encoding="utf-8"))
    manifest["versions"] = environment()
    manifest["recipe"] = wanted.model_dump(mode="json", exclude_none=True)
    manifest["measures"] = {"before": found.before, "after": found.after}
    manifest["seconds"], manifest["peak_memory_bytes"] = found.seconds, found.peak_memory
    (staging / "secateur.json").write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(staging, out)
