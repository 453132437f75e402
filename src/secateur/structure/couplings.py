"""What can be removed from a model: all couplings, and the reason for everything that is protected."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from secateur.errors import SecateurError
from secateur.stream.blocks import find_members
from secateur.structure.attention import replace_
from secateur.structure.coupling import Coupling
from secateur.structure.kinds import named
from secateur.structure.rehearsal import Reference, rehearsed
from secateur.structure.running import Inputs, evaluating, runner, writing
from secateur.structure.watch import Facts, follow, on_meta, tensors_of


@dataclass
class Couplings:
    """The couplings of a model. protected: dimension of a parameter -> why nothing can be removed from it."""

    model: nn.Module
    found: list[Coupling]
    protected: dict[str, str]
    facts: Facts
    inputs: Inputs
    reference: Reference
    stored: dict[str, int] = field(
        default_factory=dict
    )  # tensor -> bytes of an element in the checkpoint, where others

    def __iter__(self) -> Iterator[Coupling]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, key: int | str) -> Coupling:
        if isinstance(key, int):
            return self.found[key]
        return next(coupling for coupling in self.found if coupling.name == key)

    def __str__(self) -> str:
        return "\n".join(map(str, self.found))


def trace(model: nn.Module, example_inputs: Inputs) -> Couplings:
    """Run the model once on example inputs, and find what can be removed from it.

    example_inputs: keyword arguments as a mapping, positional ones as a sequence, or one tensor. A model on the meta
    device is traced without weights; then shapes and numbers are checked, but no values.

    Raises SecateurError when the model does not run on the inputs. The model is left as it was.
    """
    check_traceable(model)
    run = runner(model, example_inputs)
    with evaluating(model):
        undo = replace_(model)
        try:
            with explained(model, example_inputs):
                facts = follow(model, run, writing(model, example_inputs))
            parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
            found, reference = rehearsed(model, facts, parameters, run)
            found = named(found, tensors_of(model), list(find_members(model)))
            return Couplings(model, found, _protected(model, facts), facts, example_inputs, reference)
        finally:
            undo()


def check_traceable(model: nn.Module) -> None:
    """Raises SecateurError for what cannot be followed: compiled and scripted modules, wrappers of a process group."""
    if isinstance(model, torch.jit.ScriptModule):
        raise SecateurError("a scripted module cannot be cut: give the nn.Module that it was made from")
    if hasattr(model, "_orig_mod"):
        raise SecateurError("a compiled module cannot be cut: give the module under torch.compile (model._orig_mod)")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise SecateurError(f"cut the module itself, not {type(model).__name__}: give model.module")
    if not any(True for _ in model.parameters()):
        raise SecateurError(f"{type(model).__name__} has no parameters: nothing can be removed")
    if on_meta(model) and any(buffer.device.type != "meta" for buffer in model.buffers()):
        raise SecateurError("parameters are on the meta device and buffers are not: move all of it, model.to('meta')")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and parameter.is_floating_point() and not _finite(parameter):
            raise SecateurError(f"{name} has values that are NaN or infinite: nothing could be proven of such a model")


def _finite(parameter: Tensor) -> bool:
    """Of a dense tensor; one of another layout, or of a type that torch cannot compute in, is not asked."""
    if parameter.layout != torch.strided or not parameter.numel() or parameter.element_size() < 2:
        return True
    return math.isfinite(float(torch.linalg.vector_norm(parameter.detach(), math.inf)))


@contextlib.contextmanager
def explained(model: nn.Module, inputs: Inputs) -> Iterator[None]:
    """Turn what a forward raises into one clear error."""
    try:
        yield
    except SecateurError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise SecateurError(
            f"{type(model).__name__} takes decisions by values ({error.func}), and on the meta device there are none.\n"
            "  Trace it with its weights in memory."
        ) from None
    except (TypeError, ValueError, LookupError, RuntimeError, AttributeError, AssertionError) as error:
        wanted = ", ".join(inspect.signature(model.forward).parameters)
        raise SecateurError(
            f"{type(model).__name__} does not run on the example inputs ({_shapes(inputs)}): {error}\n"
            f"  Give what its forward takes ({wanted}): a mapping of names, a sequence in their order, or one tensor."
        ) from error


def _shapes(inputs: Inputs) -> str:
    if isinstance(inputs, Tensor):
        return str(list(inputs.shape))
    if isinstance(inputs, Mapping):
        return ", ".join(
            f"{name} {_shapes(value) if isinstance(value, Tensor) else value}" for name, value in inputs.items()
        )
    return ", ".join(_shapes(value) if isinstance(value, Tensor) else type(value).__name__ for value in inputs)


def _protected(model: nn.Module, facts: Facts) -> dict[str, str]:
    parameters = dict(model.named_parameters())
    found = {}
    for name in parameters:
        for place, dim in enumerate(facts.dims[name]):
            if dim is not None and not facts.ids.free(dim):
                found[f"{name}:{place}"] = "; ".join(facts.ids.why(dim))
    return found
