"""Read .npz files whole, so that no file stays open until Python collects garbage."""

import pathlib

import numpy as np


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name."""
    with np.load(file) as arrays:
        return dict(arrays)
