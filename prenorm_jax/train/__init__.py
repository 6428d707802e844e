"""A training run: the step, the loop around it, where arrays lie, and all that a run leaves on disk.

It imports `base`, `models`, `data`, `equivalence` and `prenorm_jax.config`. Start with `step.py`, then `loop.py`.
"""
