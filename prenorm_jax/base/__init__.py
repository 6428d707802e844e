"""What every room stands on: errors in one line, the console, processes that act as one, files, flags, trees.

It imports no other room. Start with `errors.py`.
"""
