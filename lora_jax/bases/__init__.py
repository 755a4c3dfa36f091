"""The kinds of frozen weights that are not one dense array: quantised weights, one file per kind.

`held.py` holds a weight of any kind on its way through a program.
"""
