"""The model in memory, and what is done to it: whole blocks first, then sublayers, experts, widths."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.forward import default_loss
from secateur.prune import Progress
from secateur.recipe import nearest
from secateur.smaller.request import Shrunk, Smaller
from secateur.structure import (
    Plan,
    apply_,
    norm_factors,
    plan,
    plan_experts,
    plan_layers,
    plan_sublayers,
    rescale_,
    trace,
)
from secateur.structure.criteria import CRITERIA
from secateur.structure.depth import stacks
from secateur.structure.experts import expert_scores, mixtures
from secateur.structure.kinds import KINDS as KNOWN
from secateur.structure.plans import RECOMPUTED
from secateur.structure.selection import touches
from secateur.structure.sublayers import KINDS
from secateur.weights.gradients import Loss

GRADIENTS = {"gradient", "fisher"}  # statistics that take a loss
REPEATS = 7  # of a timed forward, before and after


class Work:
    """The model in memory, and what is done to it."""

    def __init__(
        self,
        model: Any,
        example: Mapping[str, Any],
        batches: Sequence[Mapping[str, Any]],
        holdout: Sequence[Tensor],
        criterion: str,
        wanted: Smaller,
        progress: Progress,
        loss: Loss | None = None,
        stored: Mapping[str, torch.dtype] | None = None,
        labelled: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.model, self.example, self.holdout = model, example, holdout
        self.criterion, self.wanted, self.progress = criterion, wanted, progress
        self.batches = [dict(batch) for batch in batches]  # what the model takes
        self.loss, self.labelled = loss, [dict(batch) for batch in labelled]  # what the loss takes, where that is more
        self.stored = {name: dtype.itemsize for name, dtype in (stored or {}).items()}
        self.seconds: dict[str, float] = {}

    def shrink(self, again: Callable[[], nn.Module]) -> Shrunk:
        """Remove what was asked for, and measure before and after. again: makes the model as it was, to be timed."""
        before = self.measures()
        plans = self.cut()
        after = self.measures()
        self.progress("time", 0, 1, "before and after in turns")
        if len(plans) == 1 and "macs" in plans[0].before:
            before["macs"], after["macs"] = plans[0].before["macs"], plans[0].after["macs"]
        before["milliseconds"], after["milliseconds"] = latencies((again(), self.model), self.example)
        return Shrunk(plans, "", before, after, self.criterion, "none", self.seconds)

    def cut(self) -> list[Plan]:
        """Whole blocks first, then widths."""
        self._check_protected()
        plans = []
        ask = dict(self.wanted.remove or {})
        layers = ask.pop("layers", None)
        if layers is not None:
            blocks = sum(len(names) for names in stacks(self.model).values())
            count = round(layers * blocks) if layers < 1 else int(layers)
            plans.append(self._timed("depth", lambda: self._layers(count)))
        parts = {kind: ask.pop(kind) for kind in KINDS if kind in ask}
        if parts:
            plans.append(self._timed("sublayers", lambda: self._sublayers(parts)))
        left = ask.pop("experts", None)
        if left is not None:
            plans.append(self._timed("experts", lambda: self._experts(left)))
        if ask or self.wanted.target:
            plans.append(self._timed("width", lambda: self._widths(ask or None)))
        return plans

    def _check_protected(self) -> None:
        """Every glob names something: a part of the model, or a kind or coupling, which the trace will find."""
        names = [*dict(self.model.named_modules()), *dict(self.model.named_parameters(remove_duplicate=False))]
        for pattern in self.wanted.protect:
            kind = pattern in KNOWN or ":" in pattern
            if not kind and not any(fnmatchcase(name, pattern) for name in names):
                raise SecateurError(f"--protect {pattern!r} names no part of this model{nearest(pattern, names)}")

    def _layers(self, count: int) -> Plan:
        found = plan_layers(
            self.model,
            self.example,
            count,
            batches=self.batches,
            contiguous=self.wanted.contiguous,
            protect=self.wanted.protect,
        )
        apply_(self.model, found, self.example)
        return found

    def _sublayers(self, parts: Mapping[str, int | float]) -> Plan:
        found = plan_sublayers(self.model, self.example, parts, batches=self.batches, protect=self.wanted.protect)
        apply_(self.model, found, self.example)
        return found

    def _experts(self, share: float) -> Plan:
        scores = expert_scores(self.model, self.batches or [self.example])
        count = max((mixture.count for mixture in mixtures(self.model)), default=0)
        left = count - (round(share * count) if share < 1 else int(share))
        found = plan_experts(self.model, self.example, left, {n: s["contribution"] for n, s in scores.items()})
        apply_(self.model, found, self.example)
        return found

    def _widths(self, ask: Mapping[str, int | float] | None) -> Plan:
        wanted = self.wanted
        self.progress("trace", 0, 1, type(self.model).__name__)
        couplings = self._timed("trace", lambda: trace(self.model, self.example))
        couplings.stored.update(self.stored)
        self.progress("plan", 0, 1, self.criterion)
        needs = CRITERIA[self.criterion].needs
        found = plan(
            couplings,
            **wanted.choice(ask, [p for p in wanted.protect if any(touches(c, p) for c in couplings)]),
            criterion=self.criterion,
            batches=((self.labelled if needs & GRADIENTS else []) or self.batches) if needs else (),
            loss=(self.loss or default_loss(self.model)) if needs & GRADIENTS else None,
            steps=wanted.steps,
        )
        factors = {}
        if found.promise == RECOMPUTED and self.batches:
            self.progress("rescale", 0, 1, "norms over what remains")
            factors = self._timed("rescale", lambda: norm_factors(self.model, found, self.batches))
        self.progress("cut", 0, 1, found.promise)
        apply_(self.model, found, self.example)
        rescale_(self.model, factors)
        return found

    def measures(self) -> dict[str, Any]:
        """Size, time of a forward, and perplexity on windows that nothing is learned from."""
        found: dict[str, Any] = {"params": sum(p.numel() for p in self.model.parameters())}
        with torch.no_grad():
            if self.holdout:
                loss = default_loss(self.model)
                losses = [float(loss(self.model, {"input_ids": window})) for window in self.holdout]
                found["perplexity"] = math.exp(min(statistics.fmean(losses), 700))
        return found

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        self.seconds[stage] = time.perf_counter() - started
        return result


def latencies(models: Sequence[nn.Module], example: Mapping[str, Any]) -> list[float]:
    """Median milliseconds of a forward of each, taken in turns: a machine's speed drifts."""
    seen: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for repeat in range(REPEATS + 1):
            for model, times in zip(models, seen, strict=True):
                started = time.perf_counter()
                model(**example)
                if repeat:  # the first one warms up
                    times.append(1000 * (time.perf_counter() - started))
    return [statistics.median(times) for times in seen]
