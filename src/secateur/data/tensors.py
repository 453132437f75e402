"""Tensors from files: safetensors and NumPy, never a pickle."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError

TENSOR_SUFFIXES = {".safetensors", ".npz", ".npy"}
TOKEN_IDS = ("input_ids", "decoder_input_ids")


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by argument name, all with the same first dimension."""
    check_exists(path)
    tensors = _load_safetensors(path) if path.suffix.lower() == ".safetensors" else load_numpy(path)
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


def load_numpy(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The arrays of a file, or those of these names; one without a name is `input_ids`."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = {"input_ids": loaded}
        else:
            arrays = {key: loaded[key] for key in loaded.files if names is None or key in names}
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


def check_exists(path: Path) -> None:
    """Raise SecateurError unless the path is a file."""
    if not path.exists():
        raise SecateurError(f"{path} does not exist; give a text file, JSON Lines or saved tensors.")
    if path.is_dir():
        raise SecateurError(f"{path} is a folder; name one file in it.")
