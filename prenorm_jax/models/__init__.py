"""The networks: norms, the residual stream and its coordinates, attention, blocks, and the families made of them.

It imports `base`. Start with `norms.py`, then `coordinates.py` and `transformer.py`; the families are in `registry.py`.
"""
