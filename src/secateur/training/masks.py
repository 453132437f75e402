"""Masks: which weights of a model are there, True = kept. They live outside the modules, by the parameter's name, so that
state dicts stay plain.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from secateur.errors import SecateurError

WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # anywhere in a parameter's name


class Masks:
    """Keep masks by parameter name, each of its parameter's shape."""

    def __init__(self, keep: Mapping[str, Tensor]) -> None:
        self.keep = {name: mask.bool() for name, mask in keep.items()}

    @classmethod
    def of_zeros(cls, model: nn.Module) -> Masks:
        """Those of a pruned checkpoint: every matrix that has zeros keeps what is not zero."""
        found = {name: whole(p.detach()) != 0 for name, p in named(model) if p.ndim > 1 and p.is_floating_point()}
        return cls({name: keep for name, keep in found.items() if not bool(keep.all())})

    @classmethod
    def of_torch_(cls, model: nn.Module) -> Masks:
        """Those of `torch.nn.utils.prune`, whose parametrizations are removed: the parameters get their plain names back.

        Raises SecateurError when there are none.
        """
        keep = {}
        for path, module in list(model.named_modules()):
            for buffer, mask in list(module.named_buffers(recurse=False)):
                name = buffer.removesuffix("_mask")
                if name != buffer and f"{name}_orig" in module._parameters:
                    keep[plain(f"{path}.{name}".lstrip("."))] = mask.bool().clone()
                    prune.remove(module, name)
        if not keep:
            raise SecateurError(f"{type(model).__name__} has no masks of torch.nn.utils.prune")
        return cls(keep)

    def beside(self, model: nn.Module) -> Masks:
        """Each where its parameter lies."""
        devices = {name: parameter.device for name, parameter in named(model)}
        return Masks({name: mask.to(devices[name]) for name, mask in self.keep.items()})

    def apply_(self, model: nn.Module) -> None:
        """Set to zero what is not kept."""
        with torch.no_grad():
            for parameter, keep in self._pairs(model):
                parameter.mul_(keep)

    def violations(self, model: nn.Module) -> int:
        """How many weights are there that should not be."""
        with torch.no_grad():
            return sum(int(whole((p != 0) & ~keep).sum()) for p, keep in self._pairs(model))

    @property
    def sparsity(self) -> float:
        """Share removed of all weights under a mask."""
        total = sum(mask.numel() for mask in self.keep.values())
        return 1 - sum(int(mask.sum()) for mask in self.keep.values()) / total if total else 0.0

    def digest(self) -> str:
        """Equal for equal masks."""
        found = hashlib.sha256()
        for name in sorted(self.keep):
            found.update(name.encode() + _packed(self.keep[name]).numpy().tobytes())
        return found.hexdigest()[:16]

    def state_dict(self) -> dict[str, Tensor]:
        """Eight weights a byte; the shapes are those of the parameters."""
        return {name: _packed(mask) for name, mask in self.keep.items()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], model: nn.Module) -> Masks:
        """Raises SecateurError when they are not those of this model's parameters."""
        parameters, keep = dict(named(model)), {}
        for name, bits in state.items():
            parameter = parameters.get(name)
            size = 0 if parameter is None else parameter.numel()
            if parameter is None or len(bits) != (size + 7) // 8:
                has = "no such parameter" if parameter is None else f"{list(parameter.shape)}"
                raise SecateurError(f"the masks are another model's: {name} has {8 * len(bits)} bits, here it is {has}")
            flat = np.unpackbits(bits.cpu().numpy(), count=size).astype(bool)
            keep[name] = torch.from_numpy(flat).reshape(parameter.shape).to(parameter.device)
        return cls(keep)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Parameters with their masks, wherever they lie."""
        for name, parameter in named(model):
            if name in self.keep:
                keep = self.keep[name]
                yield parameter, placed(keep, parameter)


def named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their plain names. Looked up each time: wrappers replace them by others."""
    return ((plain(name), parameter) for name, parameter in model.named_parameters())


def plain(name: str) -> str:
    """The name without what torch.compile, DistributedDataParallel and FSDP put into it."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def placed(values: Tensor, like: Tensor) -> Tensor:
    """A tensor on the device of another one; distributed as it is, where it is a DTensor."""
    mesh: Any = getattr(like, "device_mesh", None)
    if mesh is None:
        return values if values.device == like.device else values.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(like.device), mesh, like.placements)  # type: ignore[attr-defined]


def whole(values: Tensor) -> Tensor:
    """All of a DTensor; any other tensor itself."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values  # type: ignore[operator]


def _packed(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))
