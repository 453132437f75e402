"""Which fields of a Hugging Face config describe the shapes that a cut leaves, found by trying them on the meta device.

No list of architectures: each integer of the config is perturbed and the model built without memory; the dimensions that
move are the ones that this field owns. The fields are then solved for, and the outputs of the reloaded model decide.
"""

from __future__ import annotations

import copy
import heapq
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn

Shapes = dict[str, tuple[int, ...]]
Path = tuple[str | int, ...]  # keys of nested configs, and places in lists
MOST = 60  # configs that are followed up


def configs_for(
    model: nn.Module, config: Any, wanted: Mapping[str, tuple[int, ...]], ratios: Collection[Fraction]
) -> Iterator[Any]:
    """Copies of the config whose model has the wanted shapes, the likeliest first; which is right the outputs decide.

    config: of the model before the cut. wanted: name -> shape of every parameter and buffer after it. ratios: of what
    remains of heads; head counts that move no shape (BERT) can only follow them.
    """
    kind = type(model)
    before = _shapes(kind, config)
    if before is None:
        return
    config = _explicit(kind, config, before)
    target = {name: tuple(wanted.get(name, shape)) for name, shape in before.items()}
    if any(len(before[name]) != len(target[name]) for name in before):
        return
    fields = [path for path, _ in _integers(config)]
    owning, silent = _owners(kind, config, before, fields, _apart(before, target))
    for solved in _search(kind, config, owning, target):
        for changed in _with_heads(solved, silent, ratios):
            if _shapes(kind, changed) == target:
                yield changed


def config_without(kind: type[nn.Module], config: Any, stacks: Mapping[str, tuple[int, Sequence[int]]]) -> Any | None:
    """The config of the model without some blocks: the count of layers, and every list with an entry for each layer.

    stacks: name of a list of blocks -> how many it had, and the places that stay. None where no field counts them.
    """
    for parent, (count, places) in stacks.items():
        for path, value in _integers(config, ignored=()):
            if value != count or isinstance(path[-1], int):
                continue
            tried = copy.deepcopy(config)
            try:
                _write(tried, path, len(places))
                _shorten(_read(tried, path[:-1]), count, places)
                with torch.device("meta"):
                    found = kind(copy.deepcopy(tried)).get_submodule(parent)
            except Exception:
                continue
            if len(found) == len(places):  # type: ignore[arg-type]
                config = tried
                break
        else:
            return None
    return config


def _shorten(part: Any, count: int, places: Sequence[int]) -> None:
    """Lists with an entry for every layer lose those of the layers that go."""
    for name, value in list(vars(part).items()):
        if isinstance(value, (list, tuple)) and len(value) == count and not name.startswith("_"):
            setattr(part, name, type(value)(value[place] for place in places))


def _apart(one: Shapes, other: Shapes) -> set[tuple[str, int]]:
    """Dimensions of different sizes."""
    return {(n, d) for n, shape in one.items() for d, size in enumerate(shape) if size != other[n][d]}


def _owners(
    kind: type[nn.Module], config: Any, before: Shapes, fields: list[Path], changed: set[tuple[str, int]]
) -> tuple[list[Path], list[Path]]:
    """Fields that move a dimension which has changed, and those that move none at all."""
    owning, silent = [], []
    for path in fields:
        moved = _perturbed(kind, config, before, path)
        if moved is not None:
            dims = _apart(before, moved[1])
            if dims & changed:
                owning.append(path)
            elif not dims:
                silent.append(path)
    return owning, silent


def _perturbed(kind: type[nn.Module], config: Any, before: Shapes, path: Path) -> tuple[int, Shapes] | None:
    """Another value of a field, and the shapes that it gives; None where no value was accepted."""
    for other in _others(_read(config, path)):
        tried = copy.deepcopy(config)
        try:
            _write(tried, path, other)
        except Exception:
            continue
        moved = _shapes(kind, tried)
        if moved is not None and moved.keys() == before.keys() and all(len(moved[n]) == len(before[n]) for n in before):
            return other, moved
    return None


def _search(kind: type[nn.Module], config: Any, fields: list[Path], target: Shapes) -> Iterator[Any]:
    """Best first: change the field that leaves fewest dimensions wrong, and go on from there."""
    shapes = _shapes(kind, config)
    assert shapes is not None
    count = itertools.count()
    queue = [(len(_apart(shapes, target)), next(count), config, shapes)]
    seen: set[tuple[int | None, ...]] = set()
    for _ in range(MOST):
        if not queue:
            return
        wrong, _, current, shapes = heapq.heappop(queue)
        if not wrong:
            yield current
            continue
        for path in fields:
            for value in _values(kind, current, shapes, path, target):
                tried = copy.deepcopy(current)
                try:
                    _write(tried, path, value)
                except Exception:
                    continue
                mark = tuple(_read(tried, field) for field in fields)
                if mark in seen:
                    continue
                seen.add(mark)
                found = _shapes(kind, tried)
                if found is not None and found.keys() == target.keys():
                    heapq.heappush(queue, (len(_apart(found, target)), next(count), tried, found))


def _values(kind: type[nn.Module], config: Any, shapes: Shapes, path: Path, target: Shapes) -> list[int]:
    """What a field would have to be for each dimension that it owns and that is wrong."""
    value, moved = _read(config, path), _perturbed(kind, config, shapes, path)
    if moved is None or value is None:
        return []
    other, there = moved
    values = set()
    for name, dim in _apart(shapes, there):
        slope = Fraction(there[name][dim] - shapes[name][dim], other - value)
        found = value + Fraction(target[name][dim] - shapes[name][dim]) / slope
        if found.denominator == 1 and found > 0 and found != value:
            values.add(int(found))
    return sorted(values)


def _with_heads(config: Any, silent: list[Path], ratios: Collection[Fraction]) -> Iterator[Any]:
    """The config as it is, and with counts of heads that no shape tells as the ratios have it."""
    yield config
    counts = [path for path in silent if "head" in str(path[-1]) or "head" in str(path[-2:-1])]
    for ratio in sorted(ratios):
        tried = copy.deepcopy(config)
        values = {path: (_read(config, path) or 0) * ratio for path in counts}
        whole = {path: int(value) for path, value in values.items() if value.denominator == 1 and value > 0}
        try:
            for path, value in whole.items():
                _write(tried, path, value)
        except Exception:
            continue
        if whole:
            yield tried


def _explicit(kind: type[nn.Module], config: Any, before: Shapes) -> Any:
    """The config with derived defaults written out (GPT-2's n_inner, a head_dim), where that changes no shape."""
    config = copy.deepcopy(config)
    for part in _configs(config):
        if not hasattr(part, "head_dim"):
            part.head_dim = None  # what many models ask for with a default
    for path, value in list(_integers(config)):
        if value is not None:
            continue
        for other in _others(None):
            tried = copy.deepcopy(config)
            _write(tried, path, other)
            moved = _shapes(kind, tried)
            if moved is None or moved.keys() != before.keys():
                continue
            pairs = [(a, b) for n in before for a, b in zip(before[n], moved[n], strict=False) if a != b]
            values = {a * other // b for a, b in pairs}
            for found in sorted(values):
                _write(tried, path, found)
                if _shapes(kind, tried) == before:
                    config = tried
                    break
            break
    for part in _configs(config):
        if vars(part).get("head_dim", 0) is None:
            del part.head_dim
    return config


def _configs(config: Any) -> Iterator[Any]:
    """A config and those in it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _configs(value)


def _others(value: int | None) -> list[int]:
    """Values to perturb a field to: some leave divisibility as it is."""
    return [64, 96] if value is None else [value * 2, value + 1, value * 3, max(value // 2, 1)]


def _integers(
    config: Any, prefix: Path = (), ignored: Collection[str] | None = None
) -> Iterator[tuple[Path, int | None]]:
    """All integers of a config, of the configs in it and of its lists, and fields that are None."""
    for name, value in list(vars(config).items()):
        if (
            name.startswith("_")
            or name in (IGNORED if ignored is None else ignored)
            or name.endswith(("_token_id", "_token_index", "_token_ids"))
        ):
            continue
        path = (*prefix, name)
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _integers(value, path, ignored)
        elif type(value) is int and value > 0:
            yield path, value
        elif value is None and name.startswith(("n_", "num_", "d_", "head_", "intermediate", "hidden", "kv_")):
            yield path, None
        elif isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
            yield from (((*path, place), item) for place, item in enumerate(value) if item > 0)


IGNORED = frozenset(
    {"num_hidden_layers", "n_layer", "num_layers", "vocab_size", "max_position_embeddings", "n_positions"}
)


def _write(config: Any, path: Path, value: int) -> None:
    *steps, last = path
    owner, holder, key = config, None, None
    for step in steps:
        holder, key = owner, step
        owner = owner[step] if isinstance(step, int) else getattr(owner, step)
    if isinstance(last, int):
        items = list(owner)
        items[last] = value
        setattr(holder, str(key), type(owner)(items))
    else:
        setattr(owner, last, value)


def _read(config: Any, path: Path) -> Any:
    for step in path:
        config = config[step] if isinstance(step, int) else getattr(config, step)
    return config


def _shapes(kind: type[nn.Module], config: Any) -> Shapes | None:
    """The shapes of the model of a config, built without memory; None when it cannot be built."""
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model = kind(config)
    except Exception:
        return None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def changed_fields(before: Any, after: Any) -> dict[str, tuple[Any, Any]]:
    """What differs between two configs, by dotted name."""
    old, new = dict(_flat(before)), dict(_flat(after))
    return {name: (old.get(name), value) for name, value in new.items() if old.get(name) != value}


def _flat(config: Any) -> Iterator[tuple[str, Any]]:
    for path, value in _integers(config):
        yield ".".join(map(str, path)), value
