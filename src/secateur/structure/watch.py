"""Run a model once and see which slices of its parameters belong together.

The model's own forward runs under a dispatch mode; every ATen operator goes through its rule (see `rules`), which states
facts about the identities of indices (see `identities`). What is left free at the end are the couplings (see `coupling`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import SecateurError
from secateur.structure.identities import Dim, Identities, Indices
from secateur.structure.rules import REDUCED, RULES, views
from secateur.structure.rules.call import Call, Dims, Seen, Work, seen_in
from secateur.structure.rules.pointwise import elementwise, unary, unknown
from secateur.structure.sizes import Key, Use, Uses, remembered


@dataclass
class Facts:
    """Everything that a run told: the identities of each parameter's and buffer's indices, and what has to hold."""

    ids: Identities = field(default_factory=Identities)
    dims: dict[str, Dims] = field(default_factory=dict)
    equal_parts: list[list[Dim]] = field(default_factory=list)  # of which the same share has to stay
    grains: list[tuple[Indices, int]] = field(default_factory=list)  # that go so many at a time
    reductions: list[tuple[Dim, str]] = field(default_factory=list)  # and the module that does it
    reduced: list[tuple[str, Dims]] = field(default_factory=list)  # by norms, sums and maxima, call by call
    unknown: dict[str, str] = field(default_factory=dict)  # operator -> module where it was seen first
    uses: list[Use] = field(default_factory=list)
    compared: dict[Key, tuple[int, str]] = field(default_factory=dict)  # attributes that were: value, owner's path
    work: list[Work] = field(default_factory=list)
    operators: Counter[str] = field(default_factory=Counter)  # how often each was called
    returned: dict[str, list[Dims | None]] = field(
        default_factory=dict
    )  # module -> of the tensors it returns, in order
    trains: bool = False  # whether the model does something of its own in training mode
    traced: Identities | None = None  # as the run left them: what further runs go on from


def another_run(facts: Facts) -> Facts:
    """Facts to follow another run with, which leave those of the first one alone."""
    assert facts.traced is not None
    return Facts(facts.traced.copy(), dict(facts.dims))


class Watch(TorchDispatchMode):
    """Keeps the identities of every tensor that comes up."""

    def __init__(self, model: nn.Module, facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self.where: list[str] = []
        self.groups: dict[str, Dim] = {}
        self._run = object()
        self._dims: dict[int, Dims] = {}
        self.read: dict[int, Indices] = {}  # dimensions that operators read, not just moved; by identity
        self.reached: set[int] = set()  # identities of the objects that operators were given, or parts of them
        self._storages: dict[int, tuple[Tensor, Dims]] = {}
        for name, tensor in tensors_of(model).items():
            if id(tensor) in self._dims:
                facts.dims[name] = self._dims[id(tensor)]
                continue
            if name not in facts.dims:
                facts.dims[name] = [facts.ids.new(size) if size > 1 else None for size in tensor.shape]
            dims = self._dims[id(tensor)] = facts.dims[name]
            if tensor.layout == torch.strided:
                self._storages[tensor.untyped_storage()._cdata] = (tensor, dims)

    def dims_of(self, tensor: Tensor) -> Dims:
        """The identities of a tensor's indices; of a tensor from elsewhere, nothing can be removed."""
        found = self._dims.get(id(tensor))
        owner, when_read = getattr(tensor, "_secateur_when_read", (None, None))
        if when_read is not None and owner is self._run:
            for dim in when_read[0]:
                self.facts.ids.protect(dim, when_read[1])
        if found is not None:
            self.reached.add(id(tensor))
        else:
            owner, found = getattr(tensor, "_secateur_dims", (None, None))
            found = found if owner is self._run else None  # a model may keep tensors from one run to the next
        if found is None:
            try:
                base, dims = self._storages.get(tensor.untyped_storage()._cdata, (None, []))
            except NotImplementedError:  # a tensor inside torch.vmap: whatever it holds, what comes out is plain
                return [None] * tensor.ndim
            if base is not None:
                self.reached.add(id(base))
            if base is not None and base.shape == tensor.shape and base.stride() == tensor.stride():
                return dims
            for dim in dims:
                self.facts.ids.protect(dim, "its memory is used in a way that cannot be followed")
            return [None] * tensor.ndim
        return found

    def known(self, tensor: Tensor) -> Dims | None:
        """The same, where it can be told without touching anything."""
        owner, found = getattr(tensor, "_secateur_dims", (None, None))
        return self._dims.get(id(tensor), found if owner is self._run else None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.facts.operators[func._schema.name] += 1
        results = [value for value in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(value, Tensor)]
        if results:
            self._follow(func, args, kwargs, results)
        else:  # a number that Python reads
            self._see([*args, *kwargs.values()])
        return out

    def _follow(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        name = str(func._schema.name).split("::")[-1]
        rule = RULES.get(name)
        if rule is None:
            rule = elementwise if torch.Tag.pointwise in func.tags else unknown
        where = self.where[-1] if self.where else ""
        if rule is unknown:
            self.facts.unknown.setdefault(f"{func}", where)
        seen = tuple(self._see(value) for value in args)
        named = dict(zip((argument.name for argument in func._schema.arguments), seen, strict=False))
        named |= {name: self._see(value) for name, value in kwargs.items()}
        if rule is not unary and rule.__module__ != views.__name__:
            for operand in seen_in(named):
                self.read |= {id(dim): dim for dim in operand.dims if dim is not None}
        if name in REDUCED:
            self.facts.reduced.append((name, list(seen[0].dims)))
        shapes = [tuple(result.shape) for result in results]
        reductions: list[Dim] = []
        facts = self.facts
        call = Call(
            facts.ids, f"aten.{name}", seen, named, shapes, facts.equal_parts, reductions, self.groups, facts.work
        )
        try:
            found = rule(call)
        except (LookupError, TypeError, ValueError, AttributeError):  # called in a way that its rule does not expect
            self.facts.unknown.setdefault(f"{func}", where)
            found = unknown(call)
        self.facts.reductions += [(dim, where) for dim in reductions if dim is not None]
        for place, (result, dims) in enumerate(zip(results, found, strict=True)):
            self._keep(result, dims)
            if place in call.when_read:
                result._secateur_when_read = (self._run, call.when_read[place])  # type: ignore[attr-defined]

    def _see(self, value: Any) -> Any:
        """An argument, and what is in it where it is a list: tensors as `Seen`."""
        if isinstance(value, Tensor):
            return Seen(tuple(value.shape), self.dims_of(value), tuple(value.stride()))
        return [self._see(item) for item in value] if isinstance(value, (list, tuple)) else value

    def _keep(self, result: Tensor, dims: Dims) -> None:
        for place, (size, dim) in enumerate(zip(result.shape, dims, strict=True)):
            assert dim is None or len(dim) == size, (result.shape, [None if d is None else len(d) for d in dims])
            if size == 1 and dim is not None:
                self.facts.ids.protect(dim, "picked by its position")
                dims[place] = None
        if id(result) not in self._dims:
            result._secateur_dims = (self._run, dims)  # type: ignore[attr-defined]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under all their names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


@contextlib.contextmanager
def located(model: nn.Module, where: list[str]) -> Iterator[None]:
    """Keep the names of the modules that are at work, the innermost last."""
    names = {module: name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        where.append(names.get(module, where[-1] if where else ""))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        where.pop()

    hooks = torch.nn.modules.module
    handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        where.clear()


def on_meta(model: nn.Module) -> bool:
    """Whether any parameter has no memory."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


@contextlib.contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Operators that can be followed instead of fused ones; fake tensors for a model on the meta device."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    fused = bool(torch.backends.mkldnn.enabled)
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        torch._C._set_mkldnn_enabled(False)  # its recurrent layers are a single operator
    try:
        with (
            torch.no_grad(),
            FakeTensorMode(allow_non_fake_inputs=True) if on_meta(model) else contextlib.nullcontext(),
        ):
            yield
    finally:
        torch._C._set_mkldnn_enabled(fused)
        torch.backends.mha.set_fastpath_enabled(fast)


def follow(model: nn.Module, run: Callable[[], Any], also: Callable[[], Any] | None = None) -> Facts:
    """The facts of one run of the model. run: calls the model, and returns its output. also: another way through it."""
    facts = Facts()
    watch = Watch(model, facts)
    uses = Uses(watch.dims_of, lambda: watch.where[-1] if watch.where else "", watch.groups)
    with plainly(model), located(model, watch.where), remembered(model, facts.compared), uses, watch:
        with _noting(model, watch):
            output = run()
        work, usual = list(facts.work), Counter(facts.operators)
        if also is not None:
            with contextlib.suppress(*FAILURES):
                also()  # where the model itself cannot, there is nothing to follow
    facts.trains = _trains(model, run, usual)
    if facts.trains:
        with (
            plainly(model),
            located(model, watch.where),
            remembered(model, facts.compared),
            training(model),
            uses,
            watch,
        ):
            run()
    facts.uses, facts.work = uses.found, work
    alone = list(_like_siblings(model, watch))
    _protect_unread(model, watch)
    facts.traced = facts.ids.copy()
    for name in alone:
        for dim in facts.dims[name]:
            facts.ids.protect(dim, "not used on these inputs")
    found = list(outputs_of(output))
    if not found:
        raise SecateurError(
            f"{type(model).__name__} returns {type(output).__name__}, in which no tensor is found: nothing can be proven\n"
            "  Trace a module that wraps it and returns its tensors, as a tuple or by name."
        )
    for tensor in found:
        for dim in watch.dims_of(tensor):
            facts.ids.protect(dim, "an output of the model")
    return facts


@contextlib.contextmanager
def _noting(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Keep the identities of what each module returns."""
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if module in names:
            watch.facts.returned.setdefault(names[module], []).extend(map(watch.known, floats_of(output)))

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
# what dropout and batch norms do in training
NOISE = {
    f"aten::{name}" for name in ("native_dropout", "bernoulli_", "empty_like", "div_", "mul", "mul_", "add_", "add")
}


class _Count(TorchDispatchMode):
    """How often each operator is called. Raises RuntimeError before one that would write into a parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._weights = {p.untyped_storage()._cdata for p in model.parameters() if p.layout == torch.strided}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._schema.name] += 1
        target = args[0] if func._schema.is_mutable and args else None
        storage = target.untyped_storage() if isinstance(target, Tensor) and target.layout == torch.strided else None
        if storage is not None and storage._cdata in self._weights:
            raise RuntimeError("it changes its weights as it trains")
        return func(*args, **(kwargs or {}))


def _trains(model: nn.Module, run: Callable[[], Any], usual: Counter[str]) -> bool:
    """Whether the model, in training mode, runs and calls operators that it does not call otherwise."""
    if on_meta(model):
        return False
    count = _Count(model)
    try:
        with plainly(model), training(model), count:
            run()
    except FAILURES:
        return False
    more = count.found - usual
    return any(name not in NOISE and "batch_norm" not in name for name in more)


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """In training mode; every module is in its own mode again afterwards, and parameters have the data that they had."""
    modes = [(module, module.training) for module in model.modules()]
    weights = [(parameter, parameter.data) for parameter in model.parameters()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, data in weights:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data


def _protect_unread(model: nn.Module, watch: Watch) -> None:
    """What only slices and views have met: the rows of a table of places that shorter inputs leave aside."""
    facts = watch.facts
    read = np.zeros(facts.ids.count, bool)
    if watch.read:
        read[facts.ids.leaves(np.concatenate(list(watch.read.values())))] = True
    for name, parameter in model.named_parameters(remove_duplicate=False):
        for dim in facts.dims[name] if id(parameter) in watch.reached else ():
            if dim is not None:
                free = facts.ids.leaves(dim)
                facts.ids.protect(free[~read[free]], "not used on these inputs")


def _like_siblings(model: nn.Module, watch: Watch) -> Iterator[str]:
    """Parameters that the inputs did not reach go with those of the same name, numbers apart, and shape that were reached:
    an expert that no token chose with one that some did. Yields those that have no such sibling.
    """
    facts, reached = watch.facts, {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if id(parameter) in watch.reached:
            reached.setdefault((re.sub(r"\d+", "#", name), parameter.shape), name)
    for name, parameter in parameters.items():
        if id(parameter) in watch.reached:
            continue
        sibling = reached.get((re.sub(r"\d+", "#", name), parameter.shape))
        if sibling is None:
            yield name
            continue
        for one, other in zip(facts.dims[name], facts.dims[sibling], strict=True):
            facts.ids.same(one, other)


def floats_of(output: Any) -> Iterator[Tensor]:
    """The floating point tensors of an output."""
    return (tensor for tensor in outputs_of(output) if tensor.is_floating_point())


def outputs_of(output: Any) -> Iterator[Tensor]:
    """The tensors of an output that its reader counts on: in containers and dataclasses, and where the output is some other
    object, in its attributes. Where transformers gives logits, inner states are not among them.
    """
    if _holds(output):
        output = vars(output)
    yield from _inside(output)


def _holds(value: Any) -> bool:
    """An object that is no container and not called: a namespace, a record."""
    known = isinstance(value, (Tensor, Mapping, list, tuple, nn.Module, type))
    return hasattr(value, "__dict__") and not known and not callable(value)


def _inside(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        of_transformers = hasattr(value, "to_tuple") and "logits" in value
        inner = ("hidden_state", "past_key_values", "attentions", "cache") if of_transformers else ()
        for key, part in value.items():
            if not any(word in str(key) for word in inner):
                yield from _inside(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _inside(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _inside(vars(value))
