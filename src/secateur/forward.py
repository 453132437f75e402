"""How a model is called: without a cache, and for its loss."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from secateur.data import Batch, call
from secateur.errors import SecateurError
from secateur.weights.gradients import Loss


def no_cache(model: nn.Module) -> dict[str, bool]:
    """use_cache=False where the model's forward knows the word."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def default_loss(model: nn.Module) -> Loss:
    """The model's own, on batches with labels; language models that write text take their inputs as labels, shifted
    by one. Raises SecateurError for models that take none.
    """
    if "labels" not in inspect.signature(model.forward).parameters:
        raise SecateurError(
            f"this criterion needs the loss of {type(model).__name__}, which takes no labels: "
            "give a loss function, loss(model, batch) -> scalar"
        )

    kind = type(model).__name__
    decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    writes = decodes or any(part in kind for part in ("CausalLM", "LMHead", "ForConditionalGeneration"))
    lacking = f"this criterion needs the loss of {kind}: give batches with labels, or a loss function"

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if "labels" not in batch and "input_ids" in batch:
            if not writes:
                raise SecateurError(lacking)
            labels = batch.get("decoder_input_ids", batch["input_ids"])
            # without decoder inputs an encoder-decoder makes them of the labels, one place to the right
            batch = {key: value for key, value in batch.items() if key != "decoder_input_ids"} | {"labels": labels}
        value = call(model, batch, **no_cache(model)).loss
        if value is None:
            raise SecateurError(lacking)
        return value

    return loss
