"""What can be removed from a model: all couplings, and the reason for everything that is protected."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from secateur.errors import SecateurError
from secateur.stream.blocks import find_blocks
from secateur.structure.attention import replace_
from secateur.structure.coupling import Coupling
from secateur.structure.kinds import named
from secateur.structure.rehearsal import rehearsed
from secateur.structure.watch import Facts, follow, on_meta, tensors_of

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor


@dataclass
class Couplings:
    """The couplings of a model. protected: dimension of a parameter -> why nothing can be removed from it."""

    model: nn.Module
    found: list[Coupling]
    protected: dict[str, str]
    facts: Facts
    inputs: Inputs

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
            found = named(rehearsed(model, facts, parameters, run), tensors_of(model), list(find_blocks(model)))
            return Couplings(model, found, _protected(model, facts), facts, example_inputs)
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


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode; every module is in its own mode again afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def runner(model: nn.Module, example_inputs: Inputs) -> Callable[[], Any]:
    """What runs the model on the inputs, in the dtype that its weights have at that moment, always with the same seed."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Tensor):
        args = (example_inputs,)
    elif isinstance(example_inputs, Mapping):
        kwargs = dict(example_inputs)
    else:
        args = tuple(example_inputs)

    def run() -> Any:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        meta = on_meta(model)

        def fit(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.to("meta") if meta else value
            return value.to(dtype) if value.is_floating_point() else value

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model(*map(fit, args), **{key: fit(value) for key, value in kwargs.items()})

    return run


def writing(model: Any, inputs: Inputs) -> Callable[..., Any] | None:
    """What lets a language model write, with its cache and a padded prompt: code that a plain forward does not reach."""
    able = getattr(model, "can_generate", None)
    if able is None or not able() or not isinstance(inputs, Mapping) or set(inputs) - {"input_ids", "use_cache"}:
        return None
    if getattr(model.config, "is_encoder_decoder", False) or "input_ids" not in inputs:
        return None
    if on_meta(model):
        return None
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[0, 0] = 0

    def write(tokens: int = 2, cached: bool = True) -> Any:
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=cached, pad_token_id=0
        )

    return write


def _protected(model: nn.Module, facts: Facts) -> dict[str, str]:
    parameters = dict(model.named_parameters())
    found = {}
    for name in parameters:
        for place, dim in enumerate(facts.dims[name]):
            if dim is not None and not facts.ids.free(dim):
                found[f"{name}:{place}"] = "; ".join(facts.ids.why(dim))
    return found
