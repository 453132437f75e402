"""Pruning while a model trains."""

from secateur.training.masks import Masks
from secateur.training.methods import METHODS
from secateur.training.pruner import Pruner, Refresh, TrainingReport
from secateur.training.rewind import Round, iterate_
from secateur.training.schedules import SCHEDULES
from secateur.training.structures import Structures

Gradual = Pruner  # by the name of what it does unless another method is named

__all__ = [
    "METHODS",
    "SCHEDULES",
    "Gradual",
    "Masks",
    "Pruner",
    "Refresh",
    "Round",
    "Structures",
    "TrainingReport",
    "iterate_",
]
