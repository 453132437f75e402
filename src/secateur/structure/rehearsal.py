"""Before anything is offered for removal it is rehearsed: some units of every coupling are cut, and the result is checked.

In float64 and with weights that hide nothing (zero biases and layer scales would), where the model is small enough to be
held twice. What does not pass is protected, with the reason.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.structure.coupling import Coupling, Ints, find_couplings
from secateur.structure.proof import Checked, Numbers, Wrong, check, run_listening
from secateur.structure.sizes import Clash
from secateur.structure.surgery import cut_of, dead_of
from secateur.structure.watch import Facts, tensors_of

SMALL = 200_000_000  # parameters of a model that is rehearsed in float64
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest output; some models compute in float32 inside
COARSE = 0.1  # of 16-bit types
SLOW = 0.5  # seconds of a forward in float64, above which the rehearsal keeps the model's own dtype


def rehearsed(model: nn.Module, facts: Facts, parameters: set[str], run: Callable[[], Any]) -> list[Coupling]:
    """The couplings of which some units were cut with the right result. The others get protected in `facts`."""
    with compared(model, run) as (reference, tolerance):
        stage = _Stage(model, facts, run, reference, tolerance)
        while True:
            found = [c for c in find_couplings(facts, parameters) if _can_lose(facts, c)]
            if failed := stage.failures(found):
                for coupling, reason in failed:
                    facts.ids.protect(coupling.roots, reason)
            elif together := stage.inseparable(found):
                facts.equal_parts.append([coupling.roots for coupling in together])
            else:
                return found


@contextlib.contextmanager
def compared(model: nn.Module, run: Callable[[], Any]) -> Iterator[tuple[Numbers, float]]:
    """The numbers of a run of the whole model, and how far apart outputs may be: in float64 where that is possible."""
    native = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with contextlib.ExitStack() as stack:
        dtype, reference = stack.enter_context(enlarged(model, torch.float64)), Numbers()
        try:
            started = time.perf_counter()
            reference = run_listening(model, run)[1]
            slow = time.perf_counter() - started > SLOW
        except (RuntimeError, TypeError, ValueError):  # some code insists on the dtype of its weights
            slow = True
        if slow and dtype != native:
            stack.pop_all().close()
            dtype = stack.enter_context(enlarged(model, native))
            reference = run_listening(model, run)[1]
        yield reference, TOLERANCE.get(dtype, COARSE)


def _can_lose(facts: Facts, coupling: Coupling) -> bool:
    if coupling.steps < 2:
        facts.ids.protect(coupling.roots, "nothing can go without all of it going")
    return coupling.steps >= 2


class _Stage:
    """Rehearses couplings together, and apart where they fail together."""

    def __init__(
        self, model: nn.Module, facts: Facts, run: Callable[[], Any], reference: Numbers, tolerance: float
    ) -> None:
        self._model, self._facts, self._run, self._reference = model, facts, run, reference
        self._tolerance = tolerance

    def failures(self, found: Sequence[Coupling]) -> list[tuple[Coupling, str]]:
        """Couplings that cannot be cut, and why."""
        if self.problem(found) is None:
            return []
        kinds: dict[object, list[Coupling]] = {}
        for coupling in found:
            kinds.setdefault(_likeness(coupling), []).append(coupling)
        failed = [failure for alike in kinds.values() for failure in self._among(alike)]
        if not failed:  # each kind passes alone: they pass as far as they do together
            passed: list[Coupling] = []
            for alike in kinds.values():
                if (reason := self.problem([*passed, *alike])) is None:
                    passed += alike
                else:
                    failed += [(coupling, reason) for coupling in alike]
        return failed

    def inseparable(self, found: Sequence[Coupling]) -> list[Coupling]:
        """Couplings that pass together but not alone, such as heads that one number counts in every layer."""
        first: dict[object, Coupling] = {}
        for coupling in found:
            first.setdefault(_likeness(coupling), coupling)
        for coupling in first.values():
            others = [other for other in found if other is not coupling]
            if others and (partners := self._partners([coupling], others)):
                return [coupling, *partners]
        return []

    def _partners(self, fixed: list[Coupling], others: list[Coupling]) -> list[Coupling]:
        """The fewest others without which the fixed ones fail, knowing that with all others they pass."""
        if self.problem(fixed) is None:
            return []
        if len(others) == 1:
            return others
        one, other = others[: len(others) // 2], others[len(others) // 2 :]
        for half in (one, other):
            if self.problem([*fixed, *half]) is None:
                return self._partners(fixed, half)
        needed = self._partners([*fixed, *other], one)
        return needed + self._partners([*fixed, *needed], other)

    def _among(self, alike: list[Coupling]) -> list[tuple[Coupling, str]]:
        """Failures among couplings of one kind: all of them where the first one fails alone."""
        if not alike or (reason := self.problem(alike)) is None:
            return []
        if len(alike) == 1:
            return [(alike[0], reason)]
        if (alone := self.problem(alike[:1])) is not None:
            return [(coupling, alone) for coupling in alike]
        half = max(len(alike) // 2, 1)
        return self._among(alike[:half]) + self._among(alike[half:]) or [(coupling, reason) for coupling in alike]

    def problem(self, found: Sequence[Coupling]) -> str | None:
        """What is wrong when these lose a step of units each; None when nothing is."""
        try:
            seen = check_removal(
                self._model,
                self._facts,
                [(coupling, ends(coupling)) for coupling in found],
                self._run,
                self._reference,
            )
        except (Clash, Wrong) as error:
            return str(error)
        if not seen.difference <= self._tolerance:
            return f"removing differs from zeroing by {seen.difference:.1e} of the largest output"
        return None


def share(coupling: Coupling, steps: int) -> Ints:
    """Units that a number of steps removes: the first of each block, so that all others change their places."""
    per_step = [len(block) // coupling.steps for block in coupling.blocks]
    return np.concatenate([block[: steps * n] for block, n in zip(coupling.blocks, per_step, strict=True)])


def ends(coupling: Coupling) -> Ints:
    """A step of units from the front, and where more than that stays one from the end: what is read by its place, from
    either side, moves or is missing.
    """
    first = share(coupling, 1)
    if coupling.steps < 3:
        return first
    last = [block[len(block) - len(block) // coupling.steps :] for block in coupling.blocks]
    return np.unique(np.concatenate([first, *last]))


def check_removal(
    model: nn.Module,
    facts: Facts,
    removed: Sequence[tuple[Coupling, Ints]],
    run: Callable[[], Any],
    reference: Numbers,
) -> Checked:
    """Cut, run, undo, mask, run, undo, compare. Raises Clash and Wrong."""
    dead = dead_of(facts, removed)
    return check(model, facts, cut_of(facts, dead), run, reference, dead)


def _likeness(coupling: Coupling) -> object:
    """The same for the same thing in another layer."""
    names = {(re.sub(r"\d+", "#", part.parameter), part.dim, part.indices.shape[1] == 1) for part in coupling.slices}
    return frozenset(names), len(coupling.blocks) > 1


@contextlib.contextmanager
def enlarged(model: nn.Module, wanted: torch.dtype = torch.float64) -> Iterator[torch.dtype]:
    """Small models compute in another dtype meanwhile, with constant tensors disturbed. Yields the dtype to compare in."""
    tensors = {id(t): t for t in tensors_of(model).values() if t.is_floating_point()}
    dtype = next((t.dtype for t in tensors.values()), torch.float32)
    if sum(t.numel() for t in tensors.values()) > SMALL or any(t.device.type == "meta" for t in tensors.values()):
        yield dtype
        return
    before = [(tensor, tensor.data) for tensor in tensors.values()]
    generator = torch.Generator().manual_seed(0)
    try:
        for tensor, data in before:
            tensor.data = data.to(wanted, copy=True)
            if isinstance(tensor, nn.Parameter) and (data.numel() < 2 or bool((data == data.flatten()[0]).all())):
                noise = 0.05 * torch.randn(data.shape, generator=generator, dtype=torch.float64)
                tensor.data += noise.to(data.device, wanted)
        yield wanted
    finally:
        for tensor, data in before:
            tensor.data = data
