"""Train a small net by several methods, on one process or on two ranks with half of the batch each; write what came out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import secateur
from secateur.training import Pruner, masks, moment, optimizers, pruner

WITHOUT = {  # a mechanism, and what is there when it is taken away
    "product": lambda: setattr(Pruner, "_hold", lambda self: None),
    "whole": lambda: [setattr(room, "whole", _local) for room in (masks, pruner, moment, optimizers)],
    "placed": lambda: [setattr(room, "placed", lambda values, like: values) for room in (masks, pruner, optimizers)],
    "comparison": lambda: setattr(pruner, "check_ranks", lambda masks: None),
}


def _local(values: torch.Tensor) -> torch.Tensor:
    """This rank's rows, with zeros in place of the other's."""
    if not hasattr(values, "to_local"):
        return values
    mine, full = values.to_local(), torch.zeros(values.shape, dtype=values.dtype)  # type: ignore[operator]
    first = dist.get_rank() * -(-len(full) // 2)
    full[first : first + len(mine)] = mine
    return full


METHODS = ("rigl", "set", "movement")  # gradients, random numbers, a memory


def main(how: str, out: Path, without: str = "") -> None:
    """how: one, ddp, fsdp, or apart: two ranks that nothing keeps together. without: a mechanism to take away."""
    if without:
        WITHOUT[without]()
    if how != "one":
        dist.init_process_group("gloo")
    found = {method: trained(how, method) for method in METHODS}
    torch.save(found, out / f"{'one' if how == 'one' else dist.get_rank()}.pt")
    if how != "one":
        dist.destroy_process_group()


def trained(how: str, method: str) -> dict[str, Any]:
    """The masks and weights that a training ends with."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4)
    ).double()
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x[:, :4].argmax(1)
    if how != "one":
        rank = dist.get_rank()
        x, y = x[32 * rank : 32 * rank + 32], y[32 * rank : 32 * rank + 32]
        torch.manual_seed(rank)  # random numbers of a rank's own decide nothing
    if how == "apart":
        model[0].reset_parameters()  # type: ignore[index, operator]
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[2], model):  # type: ignore[index]
            fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recipe = secateur.method("magnitude", sparsity=0.8, protect=("4",))
    held = Pruner(model, recipe, optimizer, 40, method=method, every=4)
    violations = 0
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        violations += held.report().violations
    weights = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        weights[name.removeprefix("module.")] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    changed = sum(refresh.changed for refresh in held.report().refreshes[1:])
    return {"digest": held.masks.digest(), "weights": weights, "violations": violations, "changed": changed}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
