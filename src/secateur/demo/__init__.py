"""A tiny language model that ships with secateur, and the tasks it was trained on.

MODEL is the folder of the model: stock transformers loads it. `secateur.demo.tasks` makes the tasks. This package imports
nothing heavy and knows nothing of pruning.
"""

from pathlib import Path

MODEL = Path(__file__).parent / "model"

__all__ = ["MODEL"]
