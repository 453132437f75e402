"""Before anything is offered for removal it is rehearsed: some units of every coupling are cut, and the result is checked.

In float64 and with weights that hide nothing (zero biases and layer scales would), where the model is small enough to be
held twice. What does not pass is protected, with the reason.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.structure.coupling import Coupling, Ints, find_couplings
from secateur.structure.proof import Checked, DoesNotRun, Numbers, Wrong, check, run_listening
from secateur.structure.sizes import Clash
from secateur.structure.surgery import cut_of, dead_of
from secateur.structure.watch import Facts, tensors_of

SMALL = 200_000_000  # parameters of a model that is rehearsed in float64
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the largest output; some models compute in float32 inside
COARSE = 0.1  # of 16-bit types
PARTS = (2, 3, 4)  # that code may take something in
TRIES = 10  # choices of kinds, of each number that is left out; and steps of several units
ALL_OF_IT = "nothing can go without all of it going"
Problem = Clash | Wrong
SLOW = 0.5  # seconds of a forward in float64, above which the rehearsal keeps the model's own dtype


@dataclass(frozen=True)
class Reference:
    """What a cut model is compared with: the numbers of the whole model's run, in the dtype that both compute in."""

    numbers: Numbers
    dtype: torch.dtype

    @property
    def tolerance(self) -> float:
        """How far apart outputs may be."""
        return TOLERANCE.get(self.dtype, COARSE)


def rehearsed(
    model: nn.Module, facts: Facts, parameters: set[str], run: Callable[[], Any]
) -> tuple[list[Coupling], Reference]:
    """The couplings of which some units were cut with the right result, and what they were compared with. The others get
    protected in `facts`.
    """
    with compared(model, run) as reference:
        stage = _Stage(model, facts, run, reference)
        while True:
            found = [c for c in find_couplings(facts, parameters) if _can_lose(facts, c)]
            first = stage.first_of_each(found)
            if failed := stage.failures(found):
                if ties := stage.by_share([coupling for coupling, _ in failed]):
                    for tie in ties:
                        facts.equal_parts.append([coupling.roots for coupling in tie])
                    continue
                for coupling, reason in failed:
                    if isinstance(reason, DoesNotRun) and (grain := stage.coarser(coupling)):
                        facts.grains.append((coupling.roots, grain))
                    else:
                        facts.ids.protect(coupling.roots, str(reason))
            elif (lopsided := stage.at_the_front(first)) is None and len(first) < len(found):
                return found, reference
            elif together := stage.inseparable(found, first):
                facts.equal_parts.append([coupling.roots for coupling in together])
            elif lopsided and (uneven := stage.uneven(found, first)):
                for coupling, reason in uneven:
                    if parts := stage.parts(coupling):
                        facts.equal_parts.append([coupling.roots[part] for part in parts])
                    else:
                        facts.ids.protect(coupling.roots, str(reason))
            else:
                return found, reference


@contextlib.contextmanager
def compared(model: nn.Module, run: Callable[[], Any], known: Reference | None = None) -> Iterator[Reference]:
    """What to compare cut models with meanwhile: in float64 where that is possible. known: what was found of the same model
    before, which saves its run.
    """
    native = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with contextlib.ExitStack() as stack:
        dtype, numbers = stack.enter_context(enlarged(model, known.dtype if known else torch.float64)), Numbers()
        if known and known.dtype == dtype:
            yield known
            return
        try:
            started = time.perf_counter()
            numbers = run_listening(model, run)[1]
            slow = time.perf_counter() - started > SLOW
        except (RuntimeError, TypeError, ValueError):  # some code insists on the dtype of its weights
            slow = True
        if slow and dtype != native:
            stack.pop_all().close()
            dtype = stack.enter_context(enlarged(model, native))
            numbers = run_listening(model, run)[1]
        yield Reference(numbers, dtype)


def _can_lose(facts: Facts, coupling: Coupling) -> bool:
    if coupling.steps < 2:
        facts.ids.protect(coupling.roots, ALL_OF_IT)
    return coupling.steps >= 2


class _Stage:
    """Rehearses couplings together, and apart where they fail together."""

    def __init__(self, model: nn.Module, facts: Facts, run: Callable[[], Any], reference: Reference) -> None:
        self._model, self._facts, self._run, self._reference = model, facts, run, reference
        self._grains: dict[object, int | None] = {}
        self._parts: dict[object, list[Ints]] = {}

    def failures(self, found: Sequence[Coupling]) -> list[tuple[Coupling, Problem]]:
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

    def inseparable(self, found: Sequence[Coupling], first: Sequence[Coupling]) -> list[Coupling]:
        """Couplings that pass together but not alone, such as heads that one number counts in every layer.

        The first ones of every kind are tried together, and alone where that fails.
        """
        if len(first) < len(found) and self.problem(first) is None:
            return []
        for coupling in first:
            others = [other for other in found if other is not coupling]
            if others and (partners := self._partners([coupling], others)):
                return [coupling, *partners]
        return []

    def first_of_each(self, found: Sequence[Coupling]) -> list[Coupling]:
        """One of every kind."""
        first: dict[object, Coupling] = {}
        for coupling in found:
            first.setdefault(_likeness(coupling), coupling)
        return list(first.values())

    def uneven(self, found: Sequence[Coupling], first: Sequence[Coupling]) -> list[tuple[Coupling, Problem]]:
        """Couplings that can be cut at both ends, but not at one of them, such as heads that the code takes in halves."""
        wrong = {_likeness(coupling): self.at_the_front([coupling]) for coupling in first}
        return [(coupling, problem) for coupling in found if (problem := wrong[_likeness(coupling)]) is not None]

    def parts(self, coupling: Coupling) -> list[Ints]:
        """Halves, thirds or quarters that can be cut, the same share of each; none where that does not help."""
        key = _likeness(coupling), coupling.size
        if key not in self._parts:
            counts = [n for n in PARTS if coupling.size % n == 0 and coupling.size > n and len(coupling.blocks) == 1]
            tried = [np.split(np.arange(coupling.size), n) for n in counts]
            able = [replace(coupling, blocks=tuple(blocks)) for blocks in tried]
            passed = (c for c in able if self.at_the_front([c]) is None and self.problem([c]) is None)
            self._parts[key] = list(next(passed, coupling).blocks)
        return self._parts[key] if len(self._parts[key]) > 1 else []

    def by_share(self, failed: Sequence[Coupling]) -> list[list[Coupling]]:
        """Couplings that fail, but pass when they lose the same share: the width and the heads, where the code divides one
        by the other. Each list has no more of them than it takes.
        """
        kinds: dict[object, list[Coupling]] = {}
        for coupling in failed:
            kinds.setdefault((_likeness(coupling), coupling.size), []).append(coupling)
        by_runs = sorted(kinds.values(), key=lambda alike: _runs(alike[0]))  # heads before the entries of every head
        for left_out in range(min(len(kinds) - 1, 3)):
            for chosen in itertools.islice(itertools.combinations(by_runs, len(kinds) - left_out), TRIES):
                together = [coupling for alike in chosen for coupling in alike]
                if self._shared(together) is None:
                    return self._apart(together)
        return []

    def _apart(self, together: list[Coupling]) -> list[list[Coupling]]:
        """What passes by shares, in sets that pass alone."""
        ties = []
        while together and self._shared(together) is None:
            first, *others = together
            tie = [first, *(self._partners([first], others, self._shared) if others else [])]
            ties.append(tie)
            together = [coupling for coupling in others if not any(coupling is own for own in tie)]
        return [tie for tie in ties if len(tie) > 1]

    def coarser(self, coupling: Coupling) -> int | None:
        """How many units have to go at a time, where only some numbers of them that remain can be had."""
        likeness = _likeness(coupling), coupling.size, coupling.grain
        if likeness not in self._grains:
            least = len(coupling.blocks[0]) // coupling.steps
            tried = [grain for grain in range(least + 1, coupling.size // 2 + 1) if coupling.size % grain == 0]
            passes = (g for g in tried[:TRIES] if self.problem([replace(coupling, grain=g)]) is None)
            self._grains[likeness] = next(passes, None) if len(coupling.blocks) == 1 else None
        return self._grains[likeness]

    def _shared(self, found: Sequence[Coupling]) -> Problem | None:
        """What is wrong when all of these lose the same share."""
        return self.problem(found, math.gcd(*(coupling.steps for coupling in found)))

    def _partners(
        self,
        fixed: list[Coupling],
        others: list[Coupling],
        problem: Callable[[Sequence[Coupling]], Problem | None] | None = None,
    ) -> list[Coupling]:
        """The fewest others without which the fixed ones fail, knowing that with all others they pass."""
        problem = problem or self.problem
        if problem(fixed) is None:
            return []
        if len(others) == 1:
            return others
        one, other = others[: len(others) // 2], others[len(others) // 2 :]
        for half in (one, other):
            if problem([*fixed, *half]) is None:
                return self._partners(fixed, half, problem)
        needed = self._partners([*fixed, *other], one, problem)
        return needed + self._partners([*fixed, *needed], other, problem)

    def _among(self, alike: list[Coupling]) -> list[tuple[Coupling, Problem]]:
        """Failures among couplings of one kind: all of them where the first one fails alone."""
        if not alike or (reason := self.problem(alike)) is None:
            return []
        if len(alike) == 1:
            return [(alike[0], reason)]
        if (alone := self.problem(alike[:1])) is not None:
            return [(coupling, alone) for coupling in alike]
        half = max(len(alike) // 2, 1)
        return self._among(alike[:half]) + self._among(alike[half:]) or [(coupling, reason) for coupling in alike]

    def problem(self, found: Sequence[Coupling], shares: int | None = None) -> Problem | None:
        """What is wrong when these lose some steps of units each, or some of so many equal shares; None when nothing is.

        What goes by shares is tried at one end as well: there are few, and both ends alike may leave halves in balance.
        """
        if shares == 1:
            return Wrong(ALL_OF_IT)
        wrong = self._wrong([(coupling, ends(coupling, shares)) for coupling in found])
        if wrong is None and shares:
            wrong = self._wrong([(coupling, share(coupling, coupling.steps // shares)) for coupling in found])
        return wrong

    def at_the_front(self, found: Sequence[Coupling]) -> Problem | None:
        """What is wrong when these lose half of their units, all from the front: unlike what goes at both ends, that leaves
        nothing in balance by chance.
        """
        return self._wrong([(coupling, share(coupling, coupling.steps // 2)) for coupling in found])

    def _wrong(self, removed: Sequence[tuple[Coupling, Ints]]) -> Problem | None:
        try:
            seen = check_removal(self._model, self._facts, removed, self._run, self._reference.numbers)
            seen.within(self._reference.tolerance)
        except (Clash, Wrong) as error:
            return error
        return None


def _runs(coupling: Coupling) -> int:
    """In how many pieces a unit lies."""
    return int((np.diff(coupling.slices[0].indices[0]) != 1).sum()) + 1


def _lies(indices: Ints) -> str:
    """How the first unit lies: heads in pieces of several indices, the entries of every head one by one."""
    if len(indices) == 1:
        return "alone"
    return "in pieces" if indices[1] == indices[0] + 1 else "scattered"


def share(coupling: Coupling, steps: int) -> Ints:
    """Units that a number of steps removes: the first of each block, so that all others change their places."""
    per_step = [len(block) // coupling.steps for block in coupling.blocks]
    return np.concatenate([block[: steps * n] for block, n in zip(coupling.blocks, per_step, strict=True)])


def ends(coupling: Coupling, shares: int | None = None) -> Ints:
    """Steps of units, or some of so many equal shares: from the front, and where more than that stays from the end, so that
    what is read by its place, from either side, moves or is missing; an odd number of them, as far as there are enough.
    """
    shares = shares or coupling.steps
    each = coupling.steps // shares
    first = share(coupling, each if shares < 5 else 2 * each)
    if shares < 3:
        return first
    last = [block[len(block) - len(block) * each // coupling.steps :] for block in coupling.blocks]
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
    names = {(re.sub(r"\d+", "#", part.parameter), part.dim, _lies(part.indices[0])) for part in coupling.slices}
    return frozenset(names), len(coupling.blocks) > 1


def _constant(data: Tensor) -> bool:
    """Whether all elements are equal. Where the first ones are not, the others need not be read."""
    flat = data.flatten()
    return len(flat) < 2 or (bool((flat[:64] == flat[0]).all()) and bool((flat == flat[0]).all()))


@contextlib.contextmanager
def enlarged(model: nn.Module, wanted: torch.dtype = torch.float64) -> Iterator[torch.dtype]:
    """Small models compute in another dtype meanwhile, with constant tensors disturbed. Yields the dtype to compare in."""
    tensors = {id(t): t for t in tensors_of(model).values() if t.is_floating_point()}
    dtype = next((t.dtype for t in tensors.values()), torch.float32)
    if sum(t.numel() for t in tensors.values()) > SMALL or any(t.device.type == "meta" for t in tensors.values()):
        yield dtype
        return
    before = [(tensor, tensor.data, tensor.grad) for tensor in tensors.values()]
    generator = torch.Generator().manual_seed(0)
    try:
        for tensor, data, _ in before:
            tensor.grad = None  # it would have another dtype
            tensor.data = data.to(wanted, copy=True)
            if isinstance(tensor, nn.Parameter) and _constant(data):
                noise = 0.05 * torch.randn(data.shape, generator=generator, dtype=torch.float64)
                tensor.data += noise.to(data.device, wanted)
        yield wanted
    finally:
        for tensor, data, grad in before:
            tensor.data, tensor.grad = data, grad
