"""Read .npz files whole, so that no file stays open until Python collects garbage."""

import pathlib

import numpy as np


def read(file: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(file) as arrays:
        return dict(arrays)
