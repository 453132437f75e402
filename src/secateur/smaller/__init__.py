"""A model in, a smaller model out: structure removed, the result verified before it gets its name."""

from secateur.smaller.built import remove_built
from secateur.smaller.folder import look, remove
from secateur.smaller.request import Shrunk, Smaller

__all__ = ["Shrunk", "Smaller", "look", "remove", "remove_built"]
