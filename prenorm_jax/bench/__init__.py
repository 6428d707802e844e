"""What `benchmark` and `aot` measure: contenders, tasks, timing, and programs compiled for TPUs that are not there.

It imports everything but the commands. Start with `contenders.py` and `tasks.py`.
"""
