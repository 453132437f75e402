"""Pruning under the Hugging Face Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from secateur.errors import SecateurError
from secateur.recipe import Recipe
from secateur.training.pruner import Pruner

MASKS = "secateur_masks.safetensors"


class PrunerCallback(TrainerCallback):
    """Trainer(..., callbacks=[PrunerCallback(recipe)]): a `Pruner` for the run, whose state goes into every checkpoint.

    resume: the checkpoint folder to go on from, where it is none of the Trainer's output_dir. settings: what `Pruner` takes
    beside model, recipe, optimizer and steps. pruner: there once training has begun.

    Where the Trainer loads its best checkpoint in the end, the masks are those of that one, too: it may be of a time when
    fewer weights were gone, and `pruner.report()` says so.
    """

    def __init__(self, recipe: Recipe, resume: str | Path | None = None, **settings: Any) -> None:
        self.recipe, self.settings = recipe, settings
        self._resume = None if resume is None else Path(resume)
        self.pruner: Pruner | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        resume = (self._resume or _checkpoint(args, state)) / MASKS if state.global_step else None
        if resume is not None and not resume.is_file():
            raise SecateurError(
                f"the Trainer goes on from step {state.global_step}, and {resume} is not there. Say where its checkpoint "
                "is: PrunerCallback(recipe, resume=folder)"
            )
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.pruner = Pruner(model, self.recipe, optimizer, state.max_steps, resume=resume, **self.settings)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        best = state.best_model_checkpoint
        if self.pruner is not None and args.load_best_model_at_end and best and (Path(best) / MASKS).is_file():
            self.pruner.load(Path(best) / MASKS)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.pruner is not None
        if state.is_world_process_zero:
            self.pruner.save(_checkpoint(args, state) / MASKS)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and self.pruner is not None:
            logs["sparsity"] = state.log_history[-1]["sparsity"] = self.pruner.masks.sparsity


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
