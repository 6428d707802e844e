"""Pages, tables and figures, and what `compare` says of finished runs with them.

It imports `base` alone, and so starts without JAX. Start with `runs.py`.
"""
