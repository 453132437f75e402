"""What can be pruned in a model, what is protected and why. Decided from the module tree, not from names or families."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from secateur.errors import SecateurError


@dataclass(frozen=True)
class Layer:
    """One matrix [out, in] inside a parameter.

    name: the module's path, or the parameter's; members of a stack (experts) end in [index].
    groups: rows come in this many equal groups, each with inputs of its own (grouped convolutions).
    transposed: the parameter holds [in, out] (GPT-2's Conv1D, some stacked experts).
    """

    name: str
    parameter: str
    shape: tuple[int, int]
    kind: str
    groups: int = 1
    index: int | None = None
    transposed: bool = False

    def matrix(self, parameter: Tensor) -> Tensor:
        """The parameter's part that is this layer: [out, in], a view where its memory is laid out for one."""
        part = self._part(parameter)
        return part.t() if self.transposed else part.flatten(1)

    def write_(self, parameter: Tensor, matrix: Tensor) -> None:
        """Put [out, in] in the place of what `matrix` gives, whatever the parameter's memory layout."""
        part = self._part(parameter)
        part.copy_(matrix.t() if self.transposed else matrix.reshape(part.shape))

    def _part(self, parameter: Tensor) -> Tensor:
        return parameter if self.index is None else parameter[self.index]


@dataclass(frozen=True)
class Layers:
    """layers: what is to be pruned. protected: name -> reason, for every other weight matrix."""

    layers: tuple[Layer, ...]
    protected: Mapping[str, str]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a glob matches a layer's name, with or without the index of a stack or a final ".weight"."""
    bare = name.split("[")[0]
    exact = [re.sub(r"\[(\d+)\]$", r"[[]\1]", pattern) for pattern in patterns]  # a stack's [3] is no set of characters
    return any(fnmatchcase(form, pattern) for pattern in (*patterns, *exact) for form in (name, bare, f"{bare}.weight"))


def find_layers(
    model: nn.Module, blocks: Mapping[str, nn.Module], protect: Sequence[str] = (), include: Sequence[str] = ()
) -> Layers:
    """All weight matrices, split into those to prune and those protected.

    Protected by default: what lies outside the repeated blocks (where there are any), embeddings, output heads, routers,
    depthwise convolutions, recurrent cells; in a convolutional net without repeated blocks also the first convolution
    and the last linear layer. `include` and `protect` are globs over names; protect wins.
    Raises SecateurError when a glob matches nothing.
    """
    reasons = _reasons(model, blocks)
    layers, protected, seen = [], {}, set()
    for layer, module in all_layers(model):
        parameter = model.get_parameter(layer.parameter)
        if (id(parameter), layer.index) in seen:
            continue
        seen.add((id(parameter), layer.index))
        reason = reasons.get(id(parameter)) or _by_kind(layer, module)
        if reason and not matches(layer.name, include):
            protected[layer.name] = reason
        elif matches(layer.name, protect):
            protected[layer.name] = "protected by the recipe"
        else:
            layers.append(layer)
    names = [layer.name for layer in layers] + list(protected)
    for pattern in (*protect, *include):
        if not any(matches(name, [pattern]) for name in names):
            raise SecateurError(no_match(pattern, names))
    return Layers(tuple(layers), protected)


def no_match(pattern: str, names: Sequence[str]) -> str:
    """The message for a glob that matches no layer."""
    some = "\n    ".join(names[:6])
    return (
        f"the pattern {pattern!r} matches no layer. Names are like:\n    {some}\n"
        "  `secateur doctor MODEL --names` has them all."
    )


def all_layers(model: nn.Module) -> Iterator[tuple[Layer, nn.Module]]:
    """Every weight matrix of the model, in the order of registration, whatever it is for."""
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2 or not parameter.is_floating_point():
                continue
            name = path if key == "weight" else f"{path}.{key}".lstrip(".")
            full = f"{path}.{key}".lstrip(".")
            yield from ((layer, module) for layer in _views(name, full, module, key, parameter))


def _views(name: str, full: str, module: nn.Module, key: str, parameter: Tensor) -> Iterator[Layer]:
    shape = parameter.shape
    if isinstance(module, ParametrizationList):
        yield Layer(name, full, (shape[0], shape[1:].numel()), "parametrized")
    elif isinstance(module, nn.modules.conv._ConvNd):
        kind = "transposed convolution" if module.transposed else "convolution"
        yield Layer(name, full, (shape[0], shape[1:].numel()), kind, groups=module.groups)
    elif isinstance(module, nn.RNNBase):
        yield Layer(name, full, (shape[0], shape[1]), "recurrent cell")
    elif isinstance(module, nn.Embedding):
        yield Layer(name, full, (shape[0], shape[1]), "embedding")
    elif _is_linear(module, key, parameter):
        transposed = type(module).__name__ == "Conv1D"
        out, width = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        yield Layer(name, full, (out, width), "linear", transposed=transposed)
    elif _is_stack(module, key, parameter):
        transposed = bool(getattr(module, "is_transposed", False))
        out, width = (shape[2], shape[1]) if transposed else (shape[1], shape[2])
        for index in range(shape[0]):
            yield Layer(f"{name}[{index}]", full, (out, width), "expert", index=index, transposed=transposed)
    elif parameter.ndim == 2 or min(shape) > 1:
        yield Layer(name, full, (shape[0], shape[1:].numel()), "other")


def _is_stack(module: nn.Module, key: str, parameter: Tensor) -> bool:
    """Whether a parameter is several matrices, one behind the other: experts, heads with a matrix each.

    A projection to [inputs, heads, width of a head] has three dimensions, too, and there the first is the largest. What
    is not called a weight or the like (states, queries, segments) may be no factor of a product at all.
    """
    first, *member = parameter.shape
    if len(member) != 2 or min(first, *member) == 1 or first >= math.prod(member) or isinstance(module, nn.Bilinear):
        return False
    return re.search(r"weight|proj|expert|stack|kernel|^w\d*$", key) is not None


def _is_linear(module: nn.Module, key: str, parameter: Tensor) -> bool:
    if parameter.ndim != 2:
        return False
    if isinstance(module, nn.MultiheadAttention):
        return key.endswith("proj_weight")
    return key == "weight" and (
        isinstance(module, nn.Linear)
        or type(module).__name__ == "Conv1D"
        or tuple(parameter.shape) == (getattr(module, "out_features", None), getattr(module, "in_features", None))
    )


def _by_kind(layer: Layer, module: nn.Module) -> str | None:
    """Why a matrix of this kind is protected by default."""
    if layer.kind == "convolution":
        depthwise = layer.groups > 1 and layer.groups == getattr(module, "in_channels", None)
        return "depthwise convolution: few weights, each of them alone in its channel" if depthwise else None
    if layer.kind == "linear" and layer.shape[0] == 1:
        return "gate or score: a single output"
    return {
        "embedding": "embedding",
        "transposed convolution": "transposed convolution: not supported",
        "recurrent cell": "recurrent cell: not supported",
        "parametrized": "part of a weight that is computed when it is used (weight norm and the like)",
        "other": "a parameter that is no layer's weight",
    }.get(layer.kind)


def _reasons(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[int, str]:
    """id of parameter -> why it is protected by its place in the model."""
    reasons: dict[int, str] = {}
    if blocks:
        inside = {id(p) for block in blocks.values() for p in block.parameters()}
        reasons.update({id(p): "outside the repeated blocks" for p in model.parameters() if id(p) not in inside})
    elif any(layer.kind == "convolution" for layer, _ in all_layers(model)):
        every = [layer for layer, _ in all_layers(model)]
        stem = next(layer for layer in every if layer.kind == "convolution")
        reasons[id(model.get_parameter(stem.parameter))] = "stem: the first convolution"
        if every[-1].kind == "linear":
            reasons[id(model.get_parameter(every[-1].parameter))] = "classifier: the last linear layer"
    for parameter in _routers(model):
        reasons[id(parameter)] = "router"
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            reasons[id(module.weight)] = "embedding"
    head = _head(model)
    if head is not None:
        reasons[id(head)] = (
            "output head, tied to the embedding" if reasons.get(id(head)) == "embedding" else "output head"
        )
    return reasons


def _head(model: nn.Module) -> Tensor | None:
    find = getattr(model, "get_output_embeddings", None)
    try:
        return getattr(find(), "weight", None) if find is not None else None
    except (NotImplementedError, AttributeError):
        return None


def _routers(model: nn.Module) -> Iterator[Tensor]:
    """Matrices that score experts: beside a collection of E experts, with E outputs."""
    for module in model.modules():
        experts = [child for name, child in module.named_children() if "expert" in name and _expert_count(child) > 1]
        for child in experts:
            number = _expert_count(child)
            for other in module.children():
                if other is child:
                    continue
                for parameter in other.parameters():
                    if parameter.ndim == 2 and parameter.shape[0] == number and parameter.shape[1] != number:
                        yield parameter


def _expert_count(module: nn.Module) -> int:
    if isinstance(module, nn.ModuleList):
        return len(module)
    stacked = [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 3]
    if stacked:
        return stacked[0]
    return next((len(child) for child in module.children() if isinstance(child, nn.ModuleList)), 0)
