"""What a model costs: weights that are there, bytes, multiply-accumulates, dead channels, and time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.data import call

KINDS = (nn.Linear, nn.modules.conv._ConvNd)
TRANSPOSED = nn.modules.conv._ConvTransposeNd
WARM, ROUNDS = 3, 20  # calls before time counts, and then
BATCHES = (1, 32)  # that are timed
TIMED = (WARM + ROUNDS) * sum(BATCHES)  # images that go through each model


@dataclass(frozen=True)
class Costs:
    """Of one input. nnz: parameters that are not zero; bytes: as stored dense; packed: with a bit for every weight of a
    matrix and its non-zeros alone; macs: of convolutions and linear layers; nnz_macs: those with a weight that is not zero;
    dead_channels: outputs of them whose weights are all zero, of channels.
    """

    params: int
    nnz: int
    bytes: int
    packed: int
    macs: int
    nnz_macs: int
    dead_channels: int
    channels: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def costs(model: nn.Module, example: Any) -> Costs:
    """example: inputs of the model; the first dimension is the sample, of which there may be several."""
    places: dict[str, int] = {}

    def note(name: str, module: Any, given: Tensor, out: Any) -> None:
        where = (
            given.numel() // len(module.weight) if isinstance(module, TRANSPOSED) else out.numel() // _outputs(module)
        )
        places[name] = places.get(name, 0) + where

    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: note(name, m, args[0], out))
        for name, module in model.named_modules()
        if isinstance(module, KINDS)
    ]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    samples = len(example) if isinstance(example, Tensor) else len(next(iter(example.values())))
    macs = nnz_macs = dead = channels = 0
    for name, count in places.items():
        module: Any = model.get_submodule(name)
        there = module.weight != 0
        each = count // samples  # positions at which the whole weight is used
        macs += each * there.numel()
        nnz_macs += each * int(there.sum())
        alive = int(_alive(module, there).sum())
        dead, channels = dead + _outputs(module) - alive, channels + _outputs(module)
    parameters = list({id(p): p for p in model.parameters()}.values())
    tensors = [*parameters, *model.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    packed = sum(_packed(t) for t in tensors)
    nnz = sum(int((p != 0).sum()) for p in parameters)
    return Costs(sum(p.numel() for p in parameters), nnz, size, packed, macs, nnz_macs, dead, channels)


def _outputs(module: Any) -> int:
    """Channels of the output."""
    return module.weight.shape[1] * module.groups if isinstance(module, TRANSPOSED) else len(module.weight)


def _alive(module: Any, there: Tensor) -> Tensor:
    """Which channels of the output have a weight."""
    if not isinstance(module, TRANSPOSED):
        return there.flatten(1).any(1)
    return there.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(2).any(2).flatten()  # [in, out / groups, ..]


def _packed(tensor: Tensor) -> int:
    """Bytes of a tensor: dense, or a bit for each value and the values that are not zero, whichever is less."""
    dense = tensor.numel() * tensor.element_size()
    if tensor.ndim < 2:
        return dense
    return min(dense, (tensor.numel() + 7) // 8 + int((tensor != 0).sum()) * tensor.element_size())


def latency(
    models: Mapping[str, nn.Module], example: Tensor, batches: Sequence[int] = BATCHES, rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward in eval mode, the models in turns: {model: {"p50_1": .., "p95_1": .., "p50_32": ..}}.

    example: [n, ..]; it is repeated to the size of a batch.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for model in models.values():
        model.eval()
    with torch.no_grad():
        for size in batches:
            x = example.repeat(-(-size // len(example)), *[1] * (example.ndim - 1))[:size]
            times: dict[str, list[float]] = {name: [] for name in models}
            for number in range(WARM + rounds):
                for name, model in models.items():
                    started = _now(x)
                    call(model, x)
                    if number >= WARM:
                        times[name].append(1000 * (_now(x) - started))
            for name, values in times.items():
                found[name] |= {
                    f"p50_{size}": float(np.percentile(values, 50)),
                    f"p95_{size}": float(np.percentile(values, 95)),
                }
    return found


def _now(x: Tensor) -> float:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
