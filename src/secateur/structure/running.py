"""How a model is run: on example inputs, and, where it writes text, with a cache that has to agree with having none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

from secateur.forward import no_cache
from secateur.structure.proof import Wrong, difference
from secateur.structure.watch import FAILURES, on_meta

TOKENS = 4  # written in the proof
TOLERANCE = 1e-3  # of the largest logit, with a cache against without
Inputs = Mapping[str, Any] | Sequence[Any] | Tensor
Write = Callable[..., tuple[Tensor, list[Tensor]]]


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
        wide = (p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1)
        dtype = next(wide, torch.float32)
        meta = on_meta(model)

        def fit(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.to("meta") if meta else value
            return value.to(dtype) if value.is_floating_point() else value

        with torch.random.fork_rng(devices=[]), _unchanged(model):
            torch.manual_seed(0)
            return model(*map(fit, args), **{key: fit(value) for key, value in kwargs.items()})

    return run


def run_all(model: nn.Module, batches: Sequence[Inputs], hooks: Sequence[RemovableHandle] = ()) -> None:
    """Run a model on every batch, without gradients, for what its hooks see; then they are removed."""
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                runner(model, {**no_cache(model), **batch} if isinstance(batch, Mapping) else batch)()
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """What a forward leaves behind on its modules (caches, buffers that it updates or makes) is gone afterwards, so that
    each run is like the first one. Not where it changes its own weights (RWKV scales them once): then it has to remember.
    """
    with _disable_current_modes():
        tables = [vars(module) for module in model.modules()]
        outer = [(table, _public(table)) for table in tables]
        inner = [(table["_buffers"], dict(table["_buffers"])) for table in tables]
        known = [] if on_meta(model) else [b for _, before in inner for b in before.values()]
        buffers = {id(b): b for b in known if b is not None}
        kept = [(buffer, buffer.detach().clone()) for buffer in buffers.values()]
        weights = [(parameter, parameter._version) for parameter in model.parameters()]
    try:
        yield
    finally:
        for_good = any(parameter._version != version for parameter, version in weights)
        with _disable_current_modes(), torch.no_grad():
            for table, before in [] if for_good else [*outer, *inner]:
                for key in _public(table).keys() - before.keys():
                    del table[key]
                for key, value in before.items():
                    if table.get(key, table) is not value:
                        table[key] = value
            for buffer, copy in kept:  # batch norms write without a new version
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)


def _public(table: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes, without those of torch and of libraries that set hooks once and for all."""
    return {key: value for key, value in table.items() if not key.startswith("_")}


def writing(model: Any, inputs: Inputs, encoders: bool = False) -> Write | None:
    """What lets a language model write after a padded prompt, and returns tokens [batch, length] and the logits [batch,
    vocabulary] of every step. None for a model that does not write, or not from such inputs. encoders: one that reads with
    an encoder counts, too.
    """
    able = getattr(model, "can_generate", None)
    if able is None or not able() or not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        return None
    reads = bool(getattr(model.config, "is_encoder_decoder", False))
    known = {"input_ids", "use_cache", *(("decoder_input_ids",) if reads else ())}
    if (reads and not encoders) or set(inputs) - known:
        return None
    if on_meta(model):
        return None
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    if len(ids) > 1:
        mask[0, 0] = 0

    def write(tokens: int = 2, cached: bool = True) -> tuple[Tensor, list[Tensor]]:
        with _unchanged(model):
            found = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=False,
                use_cache=cached,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return found.sequences, list(found.logits)

    return write


@dataclass(frozen=True)
class Cached:
    """What a language model does with its cache. alike: it computes the same logits as without; length: what the cache of a
    prompt says how long it is.
    """

    alike: bool
    length: int | None


def cached(model: Any, inputs: Inputs) -> Cached | None:
    """How a language model writes; None for one that does not, or cannot from such inputs."""
    write = writing(model, inputs, encoders=True)
    try:
        return None if write is None else Cached(_alike(model, write), _length(model, inputs))
    except FAILURES:
        return None


def check_cached(model: Any, inputs: Inputs, before: Cached | None) -> None:
    """Raises Wrong when a model does not write as well as it did before it was cut."""
    write = writing(model, inputs, encoders=True)
    if before is None or write is None:
        return
    try:
        alike, length = _alike(model, write), _length(model, inputs)
    except FAILURES as error:
        raise Wrong(f"the cut model does not generate: {type(error).__name__}: {error}") from None
    if before.alike and not alike:
        raise Wrong("the cut model computes something else with its cache than without")
    if before.length != length:
        raise Wrong(f"the cache of the cut model takes a prompt of {before.length} tokens for one of {length}")


def _alike(model: Any, write: Write) -> bool:
    (one, with_cache), (other, plain) = (write(TOKENS, use) for use in (True, False))
    if model.dtype not in (torch.float32, torch.float64):
        return True
    start = one.shape[1] - len(with_cache)
    for step, pair in enumerate(zip(with_cache, plain, strict=False)):
        if not torch.equal(one[:, : start + step], other[:, : start + step]):
            return True  # two tokens were equally likely, and as far as that the logits agree
        if not difference([pair[0]], [pair[1]]) <= TOLERANCE:
            return False
    return True


def _length(model: Any, inputs: Any) -> int | None:
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    with torch.no_grad(), _unchanged(model):
        output = model(input_ids=inputs["input_ids"], use_cache=True)
    count = getattr(getattr(output, "past_key_values", None), "get_seq_length", None)
    return None if count is None else int(count())
