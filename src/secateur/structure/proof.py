"""Proof that a cut is right: the cut model computes what the masked model computes, operator by operator and in the end.

Two things are compared. The numbers among the operators' arguments (a scale, an epsilon) must not depend on what was cut:
that needs no weights, and works on the meta device. And the outputs must agree with those of the model in which the same
slices are zero, whose means and norms run over what remains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.structure.identities import Dim
from secateur.structure.inner import Sketches, farthest, sketched
from secateur.structure.rules import REDUCED
from secateur.structure.rules.call import Dims
from secateur.structure.surgery import Cut, alive_in, cut_, mask_, narrowed
from secateur.structure.watch import Facts, Watch, another_run, located, outputs_of, plainly, training

NORMS = frozenset({"native_layer_norm", "native_group_norm", "_fused_rms_norm"})  # other reductions have no weights
SAME = 1e-5  # relative difference of outputs that need no closer look


class Wrong(Exception):
    """A cut that does not compute what it should."""


class DoesNotRun(Wrong):
    """A cut with which the model raises an error."""


@dataclass
class Numbers:
    """The numbers that a run's operators were given, by module and operator, in order."""

    seen: dict[tuple[str, str], list[Any]] = field(default_factory=dict)

    def note(self, where: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Keep what is no tensor and no size."""
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.pointwise in func.tags or name in ("floor_divide", "polar", "baddbmm", "addmm"):
            values = [value for value in args if isinstance(value, (int, float)) and not isinstance(value, bool)]
        elif name.startswith("_scaled_dot_product"):
            values = [kwargs.get("scale")]
        elif name == "lift_fresh" and out.numel() == 1 and type(out) is Tensor and out.device.type != "meta":
            values = [out.item()]
        else:
            return
        self.seen.setdefault((where, name), []).append(values)

    def against(self, other: Numbers) -> None:
        """Raises Wrong where both runs made the same calls with other numbers."""
        for key, values in self.seen.items():
            others = other.seen.get(key, [])
            if len(values) != len(others):
                continue  # another path through the model: routing, loops over what is there
            for one, two in zip(values, others, strict=True):
                if one != two:
                    old, new = next((a, b) for a, b in zip(one, two, strict=True) if a != b)
                    raise Wrong(f"aten.{key[1]} in {key[0] or 'the model'} computes with {new} instead of {old}")


class Listen(TorchDispatchMode):
    """Only the numbers: what a cut model is run under."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = Numbers()
        self.where: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers.note(self.where[-1] if self.where else "", func, args, kwargs or {}, out)
        return out


class Astray(Exception):
    """A run that does not reduce what the traced one did, call by call."""


class Masked(Watch):
    """What a masked model is run under: norms, means and maxima run over the indices that are left.

    Which these are is known from the traced run, where this one goes the same way; it raises Astray where it does not.
    follows: find out anew instead, which takes longer.
    """

    def __init__(self, model: nn.Module, facts: Facts, dead: NDArray[np.bool_], follows: bool = True) -> None:
        super().__init__(model, another_run(facts))
        self._dead, self._follows = dead, follows
        self._known = iter(facts.reduced)
        self.restricted = False

    def _alive(self, dim: Dim) -> NDArray[np.bool_] | None:
        """Which indices have no dead factor, whatever has been protected meanwhile."""
        if dim is None:
            return None
        alive = np.ones(len(dim), bool)
        for column in self.facts.ids.factors(dim, protected=True):
            known = (column >= 0) & (column < len(self._dead))
            alive &= ~(known & self._dead[np.where(known, column, 0)])
        return alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name in REDUCED:
            call = _restricted_norm if name in NORMS else _restricted_reduction
            kept = self._kept(name, func, args, kwargs or {})
            if kept:
                self.restricted = True
                out = call(func, args, kwargs or {}, kept)
                results = [value for value in (out if isinstance(out, tuple) else [out]) if isinstance(value, Tensor)]
                self._follow(func, args, kwargs or {}, results)
                return out
        out = super().__torch_dispatch__(func, types, args, kwargs) if self._follows else func(*args, **(kwargs or {}))
        if name == "_weight_norm_interface":
            out[0].nan_to_num_(0.0)  # of a row that is zero and stays so
        return out

    def _kept(self, name: str, func: Any, args: Any, kwargs: Any) -> dict[int, Tensor]:
        """Dimension that is reduced over -> its indices that are left, where some are not."""
        x, found = args[0], {}
        dims = self._dims_at(name, x)
        between = name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor)  # two tensors
        for place in [] if between else _reduced_places(name, func, args, kwargs):
            alive = self._alive(dims[place])
            if alive is not None and not alive.all():
                found[place] = torch.from_numpy(np.flatnonzero(alive)).to(x.device)
        return found

    def _dims_at(self, name: str, x: Tensor) -> Dims:
        if self._follows:
            return self.dims_of(x)
        before, dims = next(self._known, ("", []))
        if before != name or [len(dim) for dim in dims if dim is not None] != [
            size for size, dim in zip(x.shape, dims, strict=False) if dim is not None
        ]:
            raise Astray
        return dims

    def _follow(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        if self._follows:
            super()._follow(func, args, kwargs, results)


def _reduced_places(name: str, func: Any, args: Any, kwargs: Any) -> list[int]:
    x = args[0]
    if name == "native_group_norm":
        return [1]
    if name in NORMS:
        return [x.ndim - 1 - place for place in range(len(args[1]))]
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    places = named.get("dim")
    places = [places] if isinstance(places, int) else places
    return [place % x.ndim for place in places] if places else list(range(x.ndim))


def _narrow(tensor: Tensor | None, kept: Mapping[int, Tensor]) -> Tensor | None:
    if tensor is not None:
        for place, indices in kept.items():
            tensor = tensor.index_select(place, indices)
    return tensor


def _restricted_reduction(func: Any, args: Any, kwargs: Any, kept: Mapping[int, Tensor]) -> Any:
    return func(_narrow(args[0], kept), *args[1:], **kwargs)


def _restricted_norm(func: Any, args: Any, kwargs: Any, kept: Mapping[int, Tensor]) -> Any:
    """A norm over what is left, put back among zeros."""
    x = args[0]
    small = _narrow(x, kept)
    assert small is not None
    if "group" in func._schema.name:
        own = {0: kept[1]}
        weight, bias = _narrow(args[1], own), _narrow(args[2], own)
        groups = len(torch.unique(kept[1] // (x.shape[1] // args[6])))
        out = func(small.contiguous(), weight, bias, args[3], small.shape[1], args[5], groups, *args[7:], **kwargs)
    else:
        own = {place - (x.ndim - len(args[1])): indices for place, indices in kept.items()}
        shape = list(small.shape[-len(args[1]) :])
        rest = [_narrow(arg, own) if isinstance(arg, Tensor) else arg for arg in args[2:]]
        out = func(small, shape, *rest, **kwargs)
    whole = torch.zeros_like(x)
    (place, indices), *others = kept.items()
    if others:
        raise Wrong("a norm over several dimensions of which more than one is cut")
    return (whole.index_copy(place, indices, out[0]), *out[1:])


@dataclass(frozen=True)
class Outcome:
    """What a run gave: its outputs, and what the modules returned on the way."""

    outputs: list[Tensor]
    inner: Sketches

    def against(self, want: Outcome) -> tuple[float, str]:
        """The largest relative difference, and the module that returns it; "" for the output."""
        whole = difference(want.outputs, self.outputs)
        inner, where = farthest(want.inner, self.inner)
        return (inner, where) if inner > whole else (whole, "")


def run_listening(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, Numbers]:
    """The output of a run, and its numbers."""
    listen = Listen()
    with plainly(model), located(model, listen.where), listen:
        return run(), listen.numbers


def returned(output: Any) -> list[Tensor]:
    """All that an output has, complex numbers as pairs of real ones."""
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in outputs_of(output)]


@dataclass(frozen=True)
class Checked:
    """What was seen: the largest difference relative to the largest output, or to what a module on the way returns (where);
    whether a norm ran over what was left; and which answer to what the attributes should be was right.
    """

    difference: float
    restricted: bool
    answer: int
    where: str = ""

    def within(self, tolerance: float) -> None:
        """Raises Wrong where it is not."""
        if not self.difference <= tolerance:
            of = f"of what {self.where} returns" if self.where else "of the largest output"
            raise Wrong(f"removing differs from zeroing by {self.difference:.1e} {of}")


def check(
    model: nn.Module,
    facts: Facts,
    cut: Cut,
    run: Callable[[], Any],
    reference: Numbers,
    dead: NDArray[np.bool_],
    masked: Cut | None = None,
) -> Checked:
    """Cut, run, undo; mask, run, undo; compare. The model is as it was afterwards. Raises Wrong.

    dead: which identities the cut removes. masked: what to mask where that is not what is cut, to test this very check.
    """
    got, answer = _first_that_runs(model, cut, run, reference, facts.trains)
    if not got.outputs:
        raise Wrong("the model returns no tensors to compare")
    if got.outputs[0].device.type == "meta":
        return Checked(0.0, False, answer)
    whole = masked or cut
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    alone = Cut({name: dims for name, dims in whole.kept.items() if name in parameters}, whole.attributes)
    if not _reduces_over(facts, dead):  # then nothing has to be followed, which takes most of the time
        apart, where = got.against(_plain_outcome(model, facts, alone, run, dead))
        if apart <= SAME:
            return Checked(apart, False, answer, where)
    for cut in (alone, whole):  # constants of a channel too, where the weights behind them do not see to it
        want, restricted = _masked_outcome(model, facts, cut, run, dead)
        apart, where = got.against(want)
        if apart <= SAME:
            break
    return Checked(apart, restricted, answer, where)


def _reduces_over(facts: Facts, dead: NDArray[np.bool_]) -> bool:
    """Whether a norm, a mean or a maximum runs over anything that is removed."""
    for dim, _ in facts.reductions:
        for column in [] if dim is None else facts.ids.factors(dim, protected=True):
            known = column[(column >= 0) & (column < len(dead))]
            if dead[known].any():
                return True
    return False


def _narrower(facts: Facts, dead: NDArray[np.bool_]) -> Callable[[str, int, Tensor], Tensor]:
    """Takes what is left of the tensors that the modules of a masked model return."""
    known: dict[int, np.ndarray | None] = {}

    def kept(dim: Dim) -> np.ndarray | None:
        if id(dim) not in known:
            alive = alive_in(facts, dim, dead)
            known[id(dim)] = None if alive is None or alive.all() else np.flatnonzero(alive)
        return known[id(dim)]

    def narrow(name: str, before: int, tensor: Tensor) -> Tensor:
        noted = facts.returned.get(name, [])
        dims = noted[before] if before < len(noted) else None
        if dims is None or len(dims) != tensor.ndim:
            return tensor
        if any(dim is not None and len(dim) != n for n, dim in zip(tensor.shape, dims, strict=True)):
            return tensor
        left = {place: kept(dim) for place, dim in enumerate(dims)}
        return narrowed(tensor, {place: indices for place, indices in left.items() if indices is not None})

    return narrow


def _plain_outcome(
    model: nn.Module, facts: Facts, cut: Cut, run: Callable[[], Any], dead: NDArray[np.bool_]
) -> Outcome:
    """That of the model in which the slices are zero."""
    undo = mask_(model, cut)
    try:
        with plainly(model), sketched(model, _narrower(facts, dead)) as inner:
            return Outcome(returned(run()), inner)
    finally:
        undo()


def _first_that_runs(
    model: nn.Module, cut: Cut, run: Callable[[], Any], reference: Numbers, trains: bool
) -> tuple[Outcome, int]:
    """The outcome with the first answer to what the attributes should be that runs, and that answer's place."""
    wrong: list[Wrong] = []
    for answer in range(len(cut.attributes)):
        undo = cut_(model, cut, answer)
        try:
            with sketched(model) as inner:
                output, numbers = run_listening(model, run)
            reference.against(numbers)
            if trains:
                with training(model), torch.no_grad():
                    run()
            return Outcome(returned(output), inner), answer
        except Wrong as error:
            wrong.append(error)
        except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError) as error:
            wrong.append(DoesNotRun(f"the cut model does not run: {_first_line(error)}{_line_of(error)}"))
        finally:
            undo()
    raise wrong[0]


def _masked_outcome(
    model: nn.Module, facts: Facts, cut: Cut, run: Callable[[], Any], dead: NDArray[np.bool_]
) -> tuple[Outcome, bool]:
    """That of the masked model, and whether a norm, mean or maximum ran over what is left."""
    undo = mask_(model, cut)
    try:
        try:
            return _run_masked(model, facts, Masked(model, facts, dead, follows=False), run, dead)
        except Astray:
            return _run_masked(model, facts, Masked(model, facts, dead), run, dead)
    finally:
        undo()


def _run_masked(
    model: nn.Module, facts: Facts, masked: Masked, run: Callable[[], Any], dead: NDArray[np.bool_]
) -> tuple[Outcome, bool]:
    with plainly(model), located(model, masked.where), sketched(model, _narrower(facts, dead)) as inner, masked:
        output = run()
    return Outcome(returned(output), inner), masked.restricted


def difference(want: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest difference of two lists of outputs, relative to the largest of each; inf where they are not alike."""
    worst = 0.0
    if len(want) != len(got):
        return math.inf
    for one, other in zip(want, got, strict=True):
        if one.shape != other.shape:
            return math.inf
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return math.inf
            continue
        size = float(one.abs().max()) if one.numel() else 0.0
        apart = float((one - other).abs().max()) if one.numel() else 0.0
        found = apart / size if size > 0 else apart
        worst = max(worst, found if math.isfinite(found) else math.inf)
    return worst


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _line_of(error: BaseException) -> str:
    """Where in the model's own code it happened."""
    place, step = "", error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if "/torch/" not in name and "/secateur/structure/" not in name:
            place = f" ({name.rsplit('/', 1)[-1]}, line {step.tb_lineno})"
        step = step.tb_next
    return place
