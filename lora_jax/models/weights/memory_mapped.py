"""Arrays in a file, of which one part at a time is memory-mapped, and only while it is in use.

A file that stays mapped keeps the pages that were read in this process's resident memory. Here each
read maps the rows it is asked for and nothing else, and the mapping ends with the array it gave.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.models.errors import WeightsError
from lora_jax.models.weights.shards import Index

_SHOWN = 200  # characters of a file's own text in a message: a name may have millions


@dataclasses.dataclass(frozen=True)
class Region:
    """An array in C order, `offset` bytes into a file."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def end(self) -> int:
        """The byte of the file behind the last one."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: Index) -> np.ndarray:
        """The part at `index` (a slice with start and stop for each axis), read-only.

        It is a view of the mapped rows: copy it, do not keep it.
        """
        rows, *inner = index
        row = math.prod(self.shape[1:])
        count = (rows.stop - rows.start) * row
        if count == 0:  # which cannot be mapped
            return np.empty([axis.stop - axis.start for axis in index], self.dtype)
        first = self.offset + rows.start * row * self.dtype.itemsize
        shape = (rows.stop - rows.start, *self.shape[1:])
        return np.memmap(self.path, self.dtype, "r", first, shape)[(slice(None), *inner)]


def unsound(path: Path, what: str, got: object, limit: object) -> WeightsError:
    """The error for a file whose header cannot be true."""
    return WeightsError(
        f"{path} is damaged, or is not what its name says: {shown(what)}\n"
        f"  got    {shown(got)}\n"
        f"  limit  {limit}\n"
        "Fetch the file again, from someone you trust."
    )


def shown(value: object) -> str:
    """A value out of a file, cut to what a message can hold."""
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def check_inside(path: Path, regions: Mapping[str, Region], size: int) -> None:
    """Every region lies in the file's `size` bytes, and none lies on another.

    So the tensors together are no larger than the file, whatever their shapes say.

    Raises:
        WeightsError: one that does not.
    """
    before, taken = "the header", 0
    for name, region in sorted(regions.items(), key=lambda item: (item[1].offset, item[1].end)):
        if region.end > size:
            what = f"tensor {shown(name)} of shape {shown(region.shape)}, {region.dtype}, ends at"
            raise unsound(path, what, f"byte {region.end}", f"the file's {size} bytes")
        if region.offset < taken:
            what = f"tensor {shown(name)} lies on {shown(before)}: it begins at"
            raise unsound(path, what, f"byte {region.offset}", f"not before byte {taken}")
        before, taken = name, region.end
