"""`fold`: the LayerNorms of any JAX function become RMSNorms, exactly, by moving the mean's removal to what writes.

It imports `base` and `report`. Start with `rules.py` (one identity for each primitive), then `plan.py` and `run.py`.
"""
