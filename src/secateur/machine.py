"""What this machine can do: which devices work, and how fast it computes. Takes a fraction of a second to find out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from secateur.errors import SecateurError

SIDE, EIGEN_SIDE, SCORES = 512, 192, 1 << 18  # sizes of what the rates are measured on
SPENT = 0.08  # seconds per rate


@dataclass(frozen=True)
class Rates:
    """flops per second of matrix products and of eigendecompositions (n^3 each), and weights chosen among per second."""

    product: float
    eigen: float
    choice: float


def check_device(name: str) -> None:
    """Raise SecateurError unless torch can compute on the device."""
    try:
        torch.ones(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        found = str(error).split(". ")[0].splitlines()[0][:120]
        raise SecateurError(
            f"--device {name} cannot be used: {found}.\n  Devices that can: {', '.join(devices())}."
        ) from None


def devices() -> list[str]:
    """The devices that torch can use here."""
    found = ["cpu"]
    found += [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def rates(device: str, dtype: torch.dtype) -> Rates:
    """Measured on small problems. On a CPU with one thread, which other work on the machine disturbs least; products
    are taken to gain from every thread that torch uses, the rest is not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(0)
        side = SIDE if dtype.itemsize >= 4 else SIDE // 2  # without support for it, half precision is slow
        matrix = torch.randn(side, side, generator=generator).to(device, dtype)
        product = 2 * side**3 / _seconds(lambda: matrix @ matrix, device)
        narrow = torch.randn(EIGEN_SIDE, SIDE, generator=generator).to(device)
        gram = narrow @ narrow.t()
        eigen = EIGEN_SIDE**3 / _seconds(lambda: torch.linalg.eigh(gram), device)
        scores = torch.rand(SCORES, generator=generator).to(device)
        choice = SCORES / _seconds(lambda: _choose(scores), device)
    finally:
        torch.set_num_threads(threads)
    return Rates(product * (threads if device == "cpu" else 1), eigen, choice)


def _choose(scores: torch.Tensor) -> torch.Tensor:
    from secateur.weights.granularity import lowest

    return lowest(scores[None], len(scores) // 2)


def _seconds(work: Callable[[], object], device: str) -> float:
    """Of one call, on average, so that what else runs on the machine counts; the first call does not."""
    work()
    _wait(device)
    started, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < SPENT or calls < 2:
        work()
        _wait(device)
        calls += 1
    return spent / calls


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
