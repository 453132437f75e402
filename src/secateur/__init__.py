"""Prune neural networks: smaller, verified, reloadable in stock libraries."""

from secateur import structure, training
from secateur._version import __version__
from secateur.errors import SecateurError
from secateur.pipeline import prune
from secateur.prune import Report, prune_
from secateur.recipe import Recipe, method
from secateur.structure import load

__all__ = [
    "Recipe",
    "Report",
    "SecateurError",
    "__version__",
    "load",
    "method",
    "prune",
    "prune_",
    "structure",
    "training",
]
