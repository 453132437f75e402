"""The repeated blocks of a model, found in its module tree: no list of architectures."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
MOST_TYPES = 3  # of modules in a list of blocks (attention and Mamba, dense and MoE); a quarter of a long one
LEAST_SHARE = 0.01  # of the parameters outside embeddings, held by one list
LEAST_TOTAL = 0.2  # ... and by all lists together


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> block, in the order of registration; empty when the model has no repeated blocks.

    Blocks are the members of the outermost `ModuleList`s and `Sequential`s that hold at least two modules, of few types,
    each with two matrices or more; where a member is itself a mere container, its own members. An encoder-decoder has two
    such lists, a vision-language model often too.
    """
    return {path: block for name, member in find_members(model).items() for path, block in _callable(name, member)}


def find_members(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> member of the lists of blocks, whole: one layer of the model each, even where it is a mere container."""
    whole = _size(model, embeddings=False)
    found = {path: member for path, member in _search(model, "", whole) if _size(member)}
    held = sum(_size(member, embeddings=False) for member in found.values())
    return found if held >= LEAST_TOTAL * whole else {}


def _search(module: nn.Module, prefix: str, whole: int) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and _repeats(child, whole):
            for key, member in child.named_children():
                yield f"{path}.{key}", member
        else:
            yield from _search(child, f"{path}.", whole)


def _callable(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module, or its parts where it is a mere container, which nobody calls as a whole or may not be so called."""
    if isinstance(module, CONTAINERS):
        for key, child in module.named_children():
            yield from _callable(f"{path}.{key}", child)
    elif _size(module):
        yield path, module


def _repeats(container: nn.Module, whole: int) -> bool:
    members = [child for child in container.children() if _size(child)]
    return (
        len(members) >= 2
        and len({type(member) for member in members}) <= max(MOST_TYPES, len(members) // 4)
        and _whole_types(members)
        and sum(_size(member, embeddings=False) for member in members) >= LEAST_SHARE * whole
    )


def _whole_types(members: list[nn.Module]) -> bool:
    """Every type has two matrices or more; a single member may have lost its own."""
    return all(any(_matrices(other) >= 2 for other in members if type(other) is type(m)) for m in members)


def _matrices(module: nn.Module) -> int:
    return sum(parameter.ndim >= 2 for parameter in module.parameters())


def _size(module: nn.Module, embeddings: bool = True) -> int:
    tables = () if embeddings else (p for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    skip = {id(table) for table in tables}
    return sum(parameter.numel() for parameter in module.parameters() if id(parameter) not in skip)
