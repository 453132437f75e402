"""Which weights matter and what to do about it: layers, statistics, criteria, granularity, allocation, updates.

Everything here works on matrices `[out, in]` in memory. It knows nothing of checkpoints, blocks or recipes.
"""
