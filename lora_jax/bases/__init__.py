"""The kinds of frozen weights that are not one dense array: quantised ones, one file a kind."""
