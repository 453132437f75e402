"""Which attributes of modules and configs count the indices of a dimension: seen from their use, never from their value.

While the model is traced, its integer attributes are replaced by integers that remember where they come from, through
arithmetic. Where one of them shapes a tensor (view, split, slices, groups), a `Use` says which dimension it counts. After
surgery the attributes follow from that: see `solve`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.structure.identities import Dim

Key = tuple[int, str, int]  # owner (its place in `owners`), attribute, place in a tuple (-1: no tuple)
Values = dict[Key, int]


class Size(int):
    """An integer that knows of which attributes it was computed. compute: their values -> this value."""

    keys: frozenset[Key]
    compute: Callable[[Values], int]
    single: Key | None  # the attribute that this number is, unchanged
    mixed: bool  # whether other integers went into it
    equals: Callable[[], None] | None = None  # what to do when it is found to equal another number

    def __new__(
        cls,
        value: int,
        keys: frozenset[Key],
        compute: Callable[[Values], int],
        single: Key | None = None,
        mixed: bool = False,
    ) -> Size:
        made = super().__new__(cls, value)
        made.keys, made.compute, made.single, made.mixed = keys, compute, single, mixed
        return made

    def _with(self, other: Any, operation: Callable[[int, int], int], swapped: bool = False) -> Any:
        if type(other) is not int and not isinstance(other, Size):
            plain = int.__new__(int, self)
            return operation(other, plain) if swapped else operation(plain, other)
        one, two = (other, self) if swapped else (self, other)
        first, second = _computes(one), _computes(two)
        keys = self.keys | (other.keys if isinstance(other, Size) else frozenset())
        mixed = self.mixed or not isinstance(other, Size) or other.mixed
        return Size(operation(int(one), int(two)), keys, lambda v: operation(first(v), second(v)), None, mixed)

    def __mul__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a * b)

    def __rmul__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a * b, swapped=True)

    def __add__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a + b)

    def __radd__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a + b, swapped=True)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a - b, swapped=True)

    def __floordiv__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a // b)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a // b, swapped=True)

    def __neg__(self) -> Any:
        return self._with(-1, lambda a, b: a * b)

    def __eq__(self, other: object) -> bool:
        same = int.__eq__(self, other)  # type: ignore[arg-type]
        if same is True and self.equals is not None:
            self.equals()
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _computes(value: Any) -> Callable[[Values], int]:
    return value.compute if isinstance(value, Size) else lambda values: int(value)


@dataclass(frozen=True)
class Use:
    """A number that counts the indices of a dimension, and the module where it does."""

    size: Size
    dim: Dim
    where: str


def owners(model: nn.Module) -> list[tuple[str, Any]]:
    """Everything that holds integers: modules, the configs that they refer to, and their records, each once."""
    found: list[tuple[str, Any]] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        found.append((name, module))
        queue = [(f"{name}.{key}".lstrip("."), value) for key, value in vars(module).items()]
        records = [
            (f"{name}.{key}".lstrip("."), v) for key, v in vars(module).items() if key[0] != "_" and _is_record(v)
        ]
        while queue:
            path, value = queue.pop()
            if id(value) in seen or not _is_config(value):
                continue
            seen.add(id(value))
            found.append((path, value))
            queue += [(f"{path}.{key}", inner) for key, inner in vars(value).items()]
        for path, value in records:
            if id(value) not in seen:
                seen.add(id(value))
                found.append((path, value))
    return found


def table_of(owner: Any) -> dict[str, Any]:
    """Where an owner has its integers, by name."""
    return owner if isinstance(owner, dict) else vars(owner)


def _is_config(value: Any) -> bool:
    """A plain object whose class is called a config: nothing that computes."""
    return hasattr(value, "__dict__") and "config" in type(value).__name__.lower() and not isinstance(value, type)


def _is_record(value: Any) -> bool:
    """A namespace, a dataclass or a dictionary of settings."""
    if type(value) is dict:
        return True  # whatever it holds at the moment
    data = dataclasses.is_dataclass(value) and not isinstance(value, (type, nn.Module)) and hasattr(value, "__dict__")
    return (data or isinstance(value, (argparse.Namespace, SimpleNamespace))) and not _is_config(value)


@contextlib.contextmanager
def remembered(model: nn.Module, compared: dict[Key, tuple[int, str]]) -> Iterator[None]:
    """Integers of modules and configs know where they come from; afterwards they are as they were. compared: to note which
    of them were found to equal another number, with their value and the module that holds them.
    """
    changed: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for number, (path, owner) in enumerate(owners(model)):
            home = path if isinstance(owner, nn.Module) else path.rpartition(".")[0]
            table = table_of(owner)
            for name, value in list(table.items()):
                if type(name) is not str or name.startswith("_"):
                    continue
                if (made := _remembering((number, name), value, home, compared)) is not None:
                    changed.append((table, name, value))
                    table[name] = made
        yield
    finally:
        for table, name, value in changed:
            if isinstance(table.get(name), (Size, tuple, list)):
                table[name] = value


def _remembering(key: tuple[int, str], value: Any, home: str, compared: dict[Key, tuple[int, str]]) -> Any:
    if type(value) is int:
        made = _attribute((*key, -1), value)
        made.equals = lambda: compared.setdefault((*key, -1), (value, home)) and None
        return made
    if type(value) in (tuple, list) and value and all(type(item) is int for item in value):
        return type(value)(_attribute((*key, place), item) for place, item in enumerate(value))
    return None


def _attribute(key: Key, value: int) -> Size:
    return Size(value, frozenset([key]), lambda values: values.get(key, value), key)


class Uses(TorchFunctionMode):
    """Records where a remembered integer shapes a tensor. groups: what the rule of a convolution found out last."""

    def __init__(
        self, dims_of: Callable[[Tensor], list[Dim]], where: Callable[[], str], groups: dict[str, Dim]
    ) -> None:
        super().__init__()
        self.found: list[Use] = []
        self._dims_of, self._where, self.groups = dims_of, where, groups

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (reader := READERS.get(getattr(func, "__name__", ""))) is not None:
            reader(self, args, kwargs, out)
        return out

    def note(self, size: Any, dim: Dim) -> None:
        """A number counts a dimension; one beyond its end counts nothing."""
        if isinstance(size, Size) and (dim is None or len(dim) == int(size)):
            self.found.append(Use(size, dim, self._where()))

    def dims(self, tensor: Any) -> list[Dim]:
        """Of a tensor, by position."""
        return self._dims_of(tensor) if isinstance(tensor, Tensor) else []


def _shape(uses: Uses, args: Any, kwargs: Any, out: Any) -> None:
    """view, reshape, expand, zeros: the sizes stand behind the tensor, alone or as a sequence."""
    rest = [arg for arg in (*args, kwargs.get("size"), kwargs.get("shape")) if not isinstance(arg, Tensor)]
    sizes = next((arg for arg in rest if isinstance(arg, (tuple, list))), [arg for arg in rest if arg is not None])
    for size, dim in zip(sizes, uses.dims(out), strict=False):
        uses.note(size, dim)


def _unflatten(uses: Uses, args: Any, kwargs: Any, out: Any) -> None:
    dim, sizes = _given(args, kwargs, "dim", "sizes")
    dims = uses.dims(out)
    start = dim % (args[0].ndim)
    for offset, size in enumerate(sizes):
        uses.note(size, dims[start + offset])


def _split(uses: Uses, args: Any, kwargs: Any, out: Any) -> None:
    sizes = next((kwargs[k] for k in ("split_size_or_sections", "split_size", "split_sizes") if k in kwargs), None)
    sizes = args[1] if sizes is None else sizes
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    sizes = sizes if isinstance(sizes, (tuple, list)) else [sizes] * len(out)
    for size, part in zip(sizes, out, strict=False):
        uses.note(size, uses.dims(part)[dim])


def _narrow(uses: Uses, args: Any, kwargs: Any, out: Any) -> None:
    dim, start, length = _given(args, kwargs, "dim", "start", "length")
    uses.note(length, uses.dims(out)[dim])
    whole = uses.dims(args[0])[dim]
    uses.note(start, whole if whole is None else whole[: int(start)])


def _item(uses: Uses, args: Any, kwargs: Any, out: Any) -> None:
    """x[..., a:b]: both count what stands before."""
    tensor, keys = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    dims = uses.dims(tensor)
    behind = len(keys) - keys.index(Ellipsis) - 1 if any(key is Ellipsis for key in keys) else None
    place = 0
    for key in keys:
        if key is Ellipsis:
            place = len(dims) - (behind or 0)
        elif key is not None:
            if isinstance(key, slice) and place < len(dims) and (dim := dims[place]) is not None:
                for end in (key.start, key.stop):
                    if isinstance(end, Size):
                        uses.note(end if end >= 0 else -end, dim[: int(end)] if end >= 0 else dim[int(end) :])
            place += 1


def _groups(uses: Uses, args: Any, kwargs: Any, out: Any) -> None:
    """Of a convolution: the number of groups follows the bias, stride, padding and dilation or output padding."""
    groups = kwargs.get("groups", args[6] if len(args) > 6 else None)
    if "groups" in uses.groups:
        uses.note(groups, uses.groups.pop("groups"))


def _group_norm(uses: Uses, args: Any, kwargs: Any, out: Any) -> None:
    """The number of groups follows the tensor."""
    if "groups" in uses.groups:
        uses.note(kwargs.get("num_groups", args[1] if len(args) > 1 else None), uses.groups.pop("groups"))


def _norm_shape(uses: Uses, args: Any, kwargs: Any, out: Any) -> None:
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    for size, dim in zip(shape, uses.dims(out)[-len(shape) :], strict=True):
        uses.note(size, dim)


def _given(args: Sequence[Any], kwargs: Any, *names: str) -> list[Any]:
    return [kwargs.get(name, args[place + 1] if len(args) > place + 1 else None) for place, name in enumerate(names)]


READERS: dict[str, Callable[[Uses, Any, Any, Any], None]] = {
    **dict.fromkeys(("view", "reshape", "expand", "broadcast_to", "_unsafe_view"), _shape),
    **dict.fromkeys(("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "randn", "rand"), _shape),
    "unflatten": _unflatten,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "narrow": _narrow,
    "__getitem__": _item,
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _groups
    ),
    "group_norm": _group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _norm_shape),
}


class Clash(Exception):
    """An attribute that would have to count two dimensions of different sizes."""


def solve(uses: Sequence[Use], remaining: Callable[[Dim], int]) -> list[Values]:
    """New values of attributes, so that each number counts what remains of its dimension: the likeliest first.

    An attribute that is used as it is follows from the dimension that it counts. One that only stands in expressions is
    solved for; whether such an expression also holds sizes of tensors, which change by themselves, cannot be seen, and
    so there are several answers to try. Raises Clash where an attribute counts dimensions of different sizes.
    """
    wanted = [(use, remaining(use.dim) if use.dim is not None else int(use.size)) for use in uses]
    direct: Values = {}
    for use, count in wanted:
        if (key := use.size.single) is not None and direct.setdefault(key, count) != count:
            raise Clash(f"{key[1]} of {use.where} would have to be {direct[key]} and {count} at once")
    answers = []
    for mixed in (False, True):
        values = dict(direct)
        for use, count in wanted:
            if use.size.single is None and (mixed or not use.size.mixed) and use.size.compute(values) != count:
                _solve_one(use, count, values)
        answers.append(values)
    pure, everything = answers
    found = [pure, direct, everything]
    return [answer for place, answer in enumerate(found) if answer not in found[:place]]


def _solve_one(use: Use, count: int, values: Values) -> None:
    """The one attribute of an expression that nothing else tells, by trying what it may be."""
    for key in use.size.keys:
        for value in range(1, 2 * int(use.size) + 1) if key not in values else ():
            if use.size.compute(values | {key: value}) == count:
                values[key] = value
                return
