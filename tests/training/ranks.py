"""Train a small net on one process, or on two ranks with half of the batch each, and write what came out."""

from __future__ import annotations

import sys
from pathlib import Path

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


def main(how: str, out: Path, without: str = "") -> None:
    """how: one, ddp, fsdp, or apart: two ranks that nothing keeps together. without: a mechanism to take away."""
    if without:
        WITHOUT[without]()
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4)
    ).double()
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x[:, :4].argmax(1)
    rank = 0
    if how != "one":
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        x, y = x[32 * rank : 32 * rank + 32], y[32 * rank : 32 * rank + 32]
    if how == "apart":
        torch.manual_seed(rank)
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
    held = Pruner(model, recipe, optimizer, 40, method="rigl", every=4)
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
    found = {"digest": held.masks.digest(), "weights": weights, "violations": violations}
    torch.save(found, out / f"{'one' if how == 'one' else rank}.pt")
    if how != "one":
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
