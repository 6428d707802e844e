"""What `benchmark`, `numerics` and `aot` measure: contenders, tasks, timing, rounding, programs compiled for TPUs.

It imports everything but the commands. Start with `contenders.py` and `tasks.py`, or `numerics.py`.
"""
