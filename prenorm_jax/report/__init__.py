"""Every page, table and figure that is drawn, and what `compare` says of finished runs with them.

It imports `base` alone, and so starts without JAX. Start with `runs.py`; the toolkit is `page`, `table` and `figure`.
"""
