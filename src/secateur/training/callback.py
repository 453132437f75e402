"""Pruning under the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from secateur.recipe import Recipe
from secateur.training.pruner import Pruner

MASKS = "secateur_masks.safetensors"


class PrunerCallback(TrainerCallback):
    """Trainer(..., callbacks=[PrunerCallback(recipe)]): a `Pruner` for the run, whose state goes into every checkpoint.

    settings: what `Pruner` takes beside model, recipe, optimizer and steps. pruner: there once training has begun.
    """

    def __init__(self, recipe: Recipe, **settings: Any) -> None:
        self.recipe, self.settings = recipe, settings
        self.pruner: Pruner | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        resume = _checkpoint(args, state) / MASKS if state.global_step else None
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.pruner = Pruner(model, self.recipe, optimizer, state.max_steps, resume=resume, **self.settings)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.pruner is not None
        if state.is_world_process_zero:
            self.pruner.save(_checkpoint(args, state) / MASKS)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and self.pruner is not None:
            logs["sparsity"] = state.log_history[-1]["sparsity"] = self.pruner.masks.sparsity


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
