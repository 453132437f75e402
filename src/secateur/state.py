"""Tensors and numbers that a run goes on from: one safetensors file, whole or not there. Never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import SecateurError


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
