"""Schedules: how sparse a model is when. Each says the sparsity at a progress in 0..1 on the way to a final sparsity.

Add one: write the function, add it to SCHEDULES, add a row to tests/training/test_schedules.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float, float], float]  # progress, final sparsity -> sparsity
CYCLES, PHASES = 3, 5


def one_shot(progress: float, final: float) -> float:
    """All of it at once, where the schedule begins."""
    return final


def linear(progress: float, final: float) -> float:
    """s t."""
    return final * progress


def cubic(progress: float, final: float) -> float:
    """s (1 - (1 - t)^3): fast at first, while there is much to spare. Zhu & Gupta 2017, arXiv:1710.01878, eq. 1."""
    return final * (1 - (1 - progress) ** 3)


def iterative(progress: float, final: float) -> float:
    """1 - (1 - s)^t: the same share of what is left each time. Han et al. 2015; Frankle & Carbin 2019, arXiv:1803.03635."""
    return 1 - (1 - final) ** progress


def cyclic(progress: float, final: float) -> float:
    """CYCLES times from nothing to s along the cubic, so that weights that went too early come back. Srinivas et al. 2022,
    arXiv:2202.01290, section 3.
    """
    phase = progress * CYCLES
    return final if progress >= 1 else cubic(phase - math.floor(phase), final)


def alternating(progress: float, final: float) -> float:
    """Dense and sparse in turns, PHASES of each, sparse at the end: what AC/DC does. Peste et al. 2021, arXiv:2106.12379,
    algorithm 1.
    """
    return final if progress >= 1 or int(progress * 2 * PHASES) % 2 else 0.0


TURNS = {"cyclic": 2 * CYCLES, "alternating": 2 * PHASES}  # that a schedule takes: masks are to be chosen in each

SCHEDULES: dict[str, Schedule] = {
    "one-shot": one_shot,
    "linear": linear,
    "cubic": cubic,
    "iterative": iterative,
    "cyclic": cyclic,
    "alternating": alternating,
}
