"""A model built without its weights, and the checkpoint they come from and go to, a block at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.stream.checkpoint import DTYPES, INDEX, PICKLES, SINGLE, Checkpoint, needs_ours, open_checkpoint
from secateur.stream.naming import Group, Naming, Read
from secateur.stream.skeleton import build, check_folder, compute, compute_dtype, may_be_missing, stored_dtype

HEAVY = 32 << 20  # bytes: tables outside the blocks larger than this are loaded when they are used
# weights in other formats, which hold the dense model, and code
NOT_COPIED = (*PICKLES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".py")


class Source:
    """A model folder: a skeleton whose parameters are on the meta device, filled block by block.

    Parameters with several names (tied weights, shared blocks) are one object under all of them.
    """

    def __init__(self, folder: Path, dtype: str, device: str) -> None:
        """Raises SecateurError for anything that is not a plain, unquantized safetensors folder."""
        self.folder = folder
        check_folder(folder)
        if needs_ours(folder):
            raise SecateurError(
                f"{folder} was cut by secateur before, and no config says its shapes: only secateur.load builds it.\n"
                "  Start from the original, or cut it so that a config can say it (docs/structure.md)."
            )
        self.checkpoint: Checkpoint = open_checkpoint(folder)
        self.device = torch.device(device)
        self.stored = stored_dtype(self.checkpoint)
        self.dtype = compute_dtype(dtype, self.stored, self.device)
        self.model = build(folder, self.dtype)
        for module in self.model.modules():
            module._buffers.update({k: b.to(self.device) for k, b in module._buffers.items() if b is not None})
        self.naming = Naming(self.model, self.checkpoint.entries, self._blank)
        self._made_by: dict[str, Group] = {name: g for g in self.naming.groups.values() for name in g.members}
        self._check_shapes()
        self._aliases = self._find_aliases()
        self._stored_dtypes: dict[str, torch.dtype] = {}
        self._lazy: list[nn.Module] = []
        self._resident = self._compute_missing()

    def other_files(self) -> list[str]:
        """Files that the result takes over as they are, those in subfolders too: configuration, tokenizer, processor."""
        replaced = {"README.md", "secateur.json", *([INDEX] if self.checkpoint.shards == [SINGLE] else [])}
        names = [path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file()]
        return sorted(
            str(name)
            for name in names
            if not any(part.startswith(".") for part in name.parts)
            and not name.name.endswith(NOT_COPIED)
            and str(name) not in replaced
        )

    def load(self, prefix: str, read: Read | None = None) -> None:
        """Fill the parameters and buffers below a module from the checkpoint, or from what `read` gives. What stays loaded
        is as it was last left, pruned or not, unless `read` has it.
        """
        start = f"{prefix}." if prefix else ""
        names = [start + name for name in self.model.get_submodule(prefix).state_dict()]
        for group in self._groups([name for name in names if read is not None or name not in self._resident]):
            self._fill(group, read)

    def free(self, prefix: str) -> None:
        """Put the parameters below a module on the meta device, but for those that others need."""
        keep = {id(self.model.get_parameter(name)) for name in self._resident}
        empty(self.model.get_submodule(prefix), keep)

    def stored_dtype(self, parameter: str) -> torch.dtype:
        """What the checkpoint stores a parameter as."""
        return self._stored_dtypes[parameter]

    def load_outside(self, blocks: Mapping[str, nn.Module]) -> None:
        """Fill everything that is not in one block alone; heavy tables only when they are used."""
        if "" in blocks:
            return
        self._resident |= self._shared(blocks)
        inside = tuple(f"{name}." for name in blocks)
        lazy = self._heavy_tables(inside)
        for group in self.naming.groups.values():
            wanted = [n for n in group.members if not n.startswith(inside) or n in self._resident]
            if any(n.rpartition(".")[0] not in lazy for name in wanted for n in self._names(name)):
                self._fill(group, None)
        for name, module in lazy.items():
            module.__dict__["_parameters"] = _OnUse(module._parameters, functools.partial(self.load, name))
            self._lazy.append(module)

    def free_tables(self) -> None:
        """Drop heavy tables until they are used again."""
        for module in self._lazy:
            empty(module)

    def parameters(self, names: Collection[str]) -> dict[str, Tensor]:
        """Name on disk -> tensor, for all that is stored of the named parameters."""
        out: dict[str, Tensor] = {}
        for group in self._groups(names):
            out.update(self.naming.disassemble(group, {name: self.model.get_parameter(name) for name in group.members}))
        return out

    def _blank(self, name: str) -> Tensor:
        entry = self.checkpoint.entries[name]
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    def _names(self, name: str) -> tuple[str, ...]:
        """All names of a parameter."""
        return self._aliases.get(name, (name,))

    def _groups(self, names: Collection[str]) -> list[Group]:
        """The groups that make the named parameters, under whichever of their names the checkpoint has them."""
        found = {g.key: g for name in names for n in self._names(name) if (g := self._made_by.get(n)) is not None}
        return list(found.values())

    def _fill(self, group: Group, read: Read | None) -> None:
        made = self.naming.assemble(group, read or self.checkpoint.read)
        if read is None:
            self.naming.verify(group, made, self.checkpoint.read)
        for name, tensor in made.items():
            self._set(name, tensor)

    def _set(self, name: str, tensor: Tensor) -> None:
        module, key = self._place(name)
        current = self._current(name)
        value = tensor.to(self.device, current.dtype, copy=True)
        if key in module._buffers:
            module._buffers[key] = value
            return
        parameter = nn.Parameter(value, requires_grad=False)
        for alias in self._names(name):
            self._stored_dtypes[alias] = tensor.dtype
            module, key = self._place(alias)
            module._parameters[key] = parameter

    def _current(self, name: str) -> Tensor:
        """A parameter or buffer as it now is: asking for it is no use of it."""
        module, key = self._place(name)
        found = module._parameters.get(key)
        found = module._buffers[key] if found is None else found
        assert found is not None
        return found

    def _place(self, name: str) -> tuple[nn.Module, str]:
        path, _, key = name.rpartition(".")
        return self.model.get_submodule(path), key

    def _find_aliases(self) -> dict[str, tuple[str, ...]]:
        """Name -> all names of the same parameter, for those that have several.

        As in stock transformers, what the config ties is not tied when the checkpoint has both, with different values.
        """
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        aliases = {}
        for group in names.values():
            stored = [name for name in group if name in self._made_by]
            apart = [name for name in stored[1:] if not self._same(stored[0], name)]
            for name in apart:
                module, key = self._place(name)
                module._parameters[key] = nn.Parameter(torch.empty_like(getattr(module, key)), requires_grad=False)
            together = tuple(name for name in group if name not in apart)
            aliases.update({name: together for name in together if len(together) > 1})
        return aliases

    def _same(self, one: str, other: str) -> bool:
        made = (self.naming.assemble(self._made_by[name], self.checkpoint.read)[name] for name in (one, other))
        return torch.equal(*made)

    def _shared(self, blocks: Mapping[str, nn.Module]) -> set[str]:
        """Parameters that lie in several blocks, or in a block and outside: they stay loaded throughout."""
        found = set()
        for name, aliases in self._aliases.items():
            homes = {next((block for block in blocks if alias.startswith(f"{block}.")), "") for alias in aliases}
            if len(homes) > 1:
                found.add(name)
        return found

    def _heavy_tables(self, inside: tuple[str, ...]) -> dict[str, nn.Module]:
        size = torch.empty(0, dtype=self.dtype).element_size()
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Embedding, nn.Linear))
            and not f"{name}.".startswith(inside)
            and not any(f"{name}.{key}" in self._resident for key in module._parameters)
            and module.weight.numel() * size > HEAVY
        }

    def _check_shapes(self) -> None:
        for group in self.naming.groups.values():
            for name, shape in group.members.items():
                needed = self._current(name).shape
                if shape != needed:
                    raise SecateurError(
                        f"{name} has shape {list(shape)} in the checkpoint; config.json makes it {list(needed)}.\n"
                        "  The config and the weights do not belong together."
                    )

    def _compute_missing(self) -> set[str]:
        """Find that the checkpoint has everything but what the model's class can make itself; make that. Its names."""
        wanted = [name for name, parameter in self.model.named_parameters() if parameter.is_meta]
        absent = [name for name in wanted if not self._groups([name])]
        missing = [name for name in absent if not may_be_missing(self.model, name)]
        if missing:
            raise SecateurError(
                f"{self.folder} lacks {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "") + ".\n"
                f"  config.json asks for a {type(self.model).__name__}; the weights are another model's, or incomplete."
            )
        compute(self.model, set(absent), self.device)
        return set(absent)


class _OnUse(dict[str, nn.Parameter | None]):
    """A module's parameters, loaded when one is first used, by a call of the module or past it."""

    def __init__(self, parameters: Mapping[str, nn.Parameter | None], load: Callable[[], None]) -> None:
        super().__init__(parameters)
        self._load = load

    def __getitem__(self, key: str) -> nn.Parameter | None:
        value = super().__getitem__(key)
        if value is not None and value.is_meta and not self._loading:
            self._loading = True
            try:
                self._load()
            finally:
                self._loading = False
        return super().__getitem__(key)

    _loading = False


def empty(module: nn.Module, keep: Collection[int] = ()) -> None:
    """Put the parameters of a module on the meta device. keep: ids of those that stay."""
    for part in module.modules():
        for key, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in keep:
                part._parameters[key] = nn.Parameter(parameter.to("meta"), requires_grad=False)
