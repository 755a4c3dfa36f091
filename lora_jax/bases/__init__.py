"""The kinds of frozen weights that are not one dense array: quantised weights, one file per kind.

`weight.py` is a weight of any kind on its way through a program.
"""
