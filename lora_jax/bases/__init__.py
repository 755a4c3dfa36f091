"""The kinds of frozen weights that are not one dense array: quantised ones, one file a kind.

`held.py` is a weight of any kind on its way through a program.
"""
