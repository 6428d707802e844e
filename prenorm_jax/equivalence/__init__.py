"""Conversion between Pre-LN, Pre-RMSNorm and Pre-CRMSNorm: which parameter does what, and what becomes of it.

It imports `base` and `models`. Which axis of a parameter lies on the stream is said where it is created
(`models/parameters.py` lists the names). Start with `roles.py`, which reads them, then `rules.py` and `convert.py`.
"""
