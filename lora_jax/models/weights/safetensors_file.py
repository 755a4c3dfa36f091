"""Read the tensors of a safetensors file in slices, with the safetensors package.

The file is opened again for each slice. While it is open, every page that was read counts as memory
of this process: 1,003 MB at the end for a file of 805 MB, against 243 MB, in the same time, if each
of 48 slices opens it again.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from lora_jax.errors import WeightsError, damaged, shown
from lora_jax.models.weights.shards import Index
from lora_jax.system import regular_files

FLOATS = ("F64", "F32", "F16", "BF16")  # the format's names of dtypes


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: its shape, and the format's name of its dtype."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, index: Index) -> np.ndarray:
        """Return a copy of the part at `index`, a slice with start and stop for each axis, of
        floats."""
        if self.dtype not in FLOATS:
            raise WeightsError(
                f"{self.path}: tensor {self.name} is stored as {self.dtype}, expected one of "
                f"{', '.join(FLOATS)}: the scaling of other numbers is not known"
            )
        return self.part(index)

    def part(self, index: Index) -> np.ndarray:
        """Return a copy of the part at `index`, for any dtype."""
        sizes = [axis.stop - axis.start for axis in index]
        if 0 in sizes:  # the package refuses an empty slice
            return np.empty(sizes, np.float32)
        with _opened(self.path) as file:
            part: np.ndarray = file.get_slice(self.name)[index]
        return part

    def whole(self) -> np.ndarray:
        """Return a copy of the whole tensor, for any dtype."""
        with _opened(self.path) as file:
            array: np.ndarray = file.get_tensor(self.name)
        return array


def tensors(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the file by its name, without reading any.

    `WeightsError`: the header is not in the format, or describes tensors that the file cannot hold.
    """
    with _opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no mapping
        return {
            name: StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
            for name, part in parts.items()
        }


def _opened(path: Path) -> Any:
    regular_files.check(path, WeightsError)
    try:
        return safetensors.safe_open(path, framework="numpy")
    except safetensors.SafetensorError as error:
        raise damaged(path, shown(error)) from error
