"""One block at a time: finding the blocks, walking real forwards through them, checkpoints bigger than memory.

Nothing here knows a criterion or a recipe.
"""
