"""Checkpoints of other libraries, in and out: each family of them is one table of what lies where.

It imports `train` and what that imports. Start with `families/gpt2.py`, then `views.py`, which reads such tables.
"""
