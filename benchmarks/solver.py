"""Speed of the SparseGPT update on one layer, against the published loop, factorization included, side by side.

    python benchmarks/solver.py [--sizes 2048,4096] [--repeats 5]

Both get the same weights and the same Gram matrix, take turns, and are compared to rounding where the published loop is
told to remove exactly as many weights (it removes one more per 128 columns). Medians go to results/solver.json, with the
time of a matrix product of the same size as the sweep's flops: how far the update is from the matmul rate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common import RESULTS, machine, write
from secateur.weights.granularity import Choose, parse
from secateur.weights.linalg import inverse_factor
from secateur.weights.sweep import sweep_matrix

BLOCK, DAMP = 128, 0.01


def published(weight: Tensor, gram: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """The loop of the SparseGPT paper's algorithm 1 as its authors' code runs it: factorize, invert, factorize again;
    blocks of 128 columns, one column at a time, each followed by a rank-one update of the rest of its block.
    """
    w, hessian = weight.clone(), gram.clone()
    width = w.shape[1]
    index = torch.arange(width)
    hessian[index, index] += DAMP * hessian.diagonal().mean()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    losses = torch.zeros(w.shape[0])
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        local, factor = w[:, start:stop].clone(), inverse[start:stop, start:stop]
        pruned, errors, loss = torch.zeros_like(local), torch.zeros_like(local), torch.zeros_like(local)
        if pattern is None:
            scores = local**2 / factor.diagonal().reshape(1, -1) ** 2
            edge = scores.flatten().sort().values[int(scores.numel() * sparsity) - 1]
            gone = scores <= edge
        else:
            gone = torch.zeros_like(local, dtype=torch.bool)
        for i in range(stop - start):
            column, scale = local[:, i], factor[i, i]
            if pattern is not None and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                scores = local[:, group] ** 2 / factor.diagonal()[group].reshape(1, -1) ** 2
                lowest = scores.topk(pattern[1] - pattern[0], dim=1, largest=False).indices
                gone.scatter_(1, i + lowest, True)
            kept = column.clone()
            kept[gone[:, i]] = 0
            pruned[:, i] = kept
            loss[:, i] = (column - kept) ** 2 / scale**2
            error = (column - kept) / scale
            local[:, i:] -= error.unsqueeze(1).matmul(factor[i, i:].unsqueeze(0))
            errors[:, i] = error
        w[:, start:stop] = pruned
        losses += loss.sum(1) / 2
        w[:, stop:] -= errors.matmul(inverse[start:stop, stop:])
    return w


def ours(weight: Tensor, gram: Tensor, choose: Choose, seconds: dict[str, list[float]]) -> Tensor:
    """The package's update; its two stages are timed apart."""
    started = time.perf_counter()
    factor, _ = inverse_factor(gram, DAMP)
    middle = time.perf_counter()
    new, _ = sweep_matrix(weight, factor, choose)
    seconds["factorization"].append(middle - started)
    seconds["sweep"].append(time.perf_counter() - middle)
    return new


def layer(size: int) -> tuple[Tensor, Tensor]:
    """Weights [size, size] and the Gram matrix of correlated inputs with channels of different scale."""
    generator = torch.Generator().manual_seed(size)
    mixing = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
    tokens = (
        torch.randn(2 * size, size, generator=generator) @ mixing * (torch.rand(size, generator=generator) * 3 + 0.1)
    )
    return torch.randn(size, size, generator=generator) * 0.02, tokens.t() @ tokens


def measure(size: int, name: str, repeats: int) -> dict[str, Any]:
    """One size and pattern."""
    weight, gram = layer(size)
    pattern = parse(name) if ":" in name else None
    choose = Choose(parse(name if pattern else "layer"), 0.5)
    pair = (pattern.n, pattern.m) if pattern else None
    stages: dict[str, list[float]] = {"factorization": [], "sweep": []}
    times: dict[str, list[float]] = {"published": [], "ours": []}
    for _ in range(repeats):
        theirs = timed(times["published"], lambda: published(weight, gram, 0.5, pair))
        mine = timed(times["ours"], lambda: ours(weight, gram, choose, stages))
    medians = {key: statistics.median(values) for key, values in {**times, **stages}.items()}
    product = matmul_seconds(size)
    disagree = float(((theirs == 0) != (mine == 0)).float().mean())
    error = float(((theirs - mine) @ gram * (theirs - mine)).sum() / ((weight @ gram) * weight).sum())
    return {
        "size": size,
        "pattern": name,
        "seconds": medians,
        "speedup": medians["published"] / medians["ours"],
        "all_seconds": times,
        "masks_differ": disagree,
        "weights_differ": error,
        "sweep_over_matmul": medians["sweep"] / product,  # size^3 flops each
        "factorization_over_matmul": medians["factorization"] / (product * 2 / 3),  # 2/3 size^3
    }


def matmul_seconds(size: int) -> float:
    """A product of [size, size] matrices takes 2 size^3 flops; half of it is the sweep's size^3 / 2 multiply-adds."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times: list[float] = []
    for _ in range(5):
        timed(times, lambda: a @ b)
    return statistics.median(times) / 2


def timed(into: list[float], work: Callable[[], Tensor]) -> Tensor:
    """Run, and note the seconds."""
    started = time.perf_counter()
    result = work()
    into.append(time.perf_counter() - started)
    return result


def main() -> None:
    """All sizes and patterns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2048,4096")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    found = []
    for size in map(int, args.sizes.split(",")):
        for pattern in ("50%", "2:4"):
            found.append(measure(size, pattern if ":" in pattern else "layer", args.repeats))
            row = found[-1]
            print(
                f"{size} {pattern}: published {row['seconds']['published']:.2f} s, ours {row['seconds']['ours']:.2f} s "
                f"({row['speedup']:.2f}x; factorization {row['seconds']['factorization']:.2f}, sweep "
                f"{row['seconds']['sweep']:.2f} = {row['sweep_over_matmul']:.1f} x its matmul time), "
                f"masks differ in {row['masks_differ']:.2e}, weights by {row['weights_differ']:.2e}",
                flush=True,
            )
    write(RESULTS / "solver.json", {"rows": found, "machine": machine()})


if __name__ == "__main__":
    main()
