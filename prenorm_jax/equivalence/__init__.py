"""Conversion between Pre-LN, Pre-RMSNorm and Pre-CRMSNorm: which parameter does what, and what becomes of it.

It imports `base` and `models`. Start with `roles.py` (what a parameter does), then `rules.py` and `convert.py`.
"""
