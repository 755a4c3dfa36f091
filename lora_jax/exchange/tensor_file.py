"""Read and write whole safetensors files of floats; `system.safetensors_reader` checks them."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import pathlib
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.errors import LoraError
from lora_jax.system import json_file, safetensors_reader
from lora_jax.system.safetensors_reader import FLOATS
from lora_jax.system.whole_files import FileWriter

LONGEST = 1_000  # characters of a name
DIGESTS = "lora_jax.digests"  # the key of our own entry in the file's metadata


class TensorFile(NamedTuple):
    """The contents of a file: its metadata, and its float arrays by name."""

    metadata: dict[str, str]
    tensors: dict[str, np.ndarray]


def read(path: pathlib.Path) -> TensorFile:
    """Read a whole file of floats; a message names the file and, if there is one, the key."""
    metadata, stored = safetensors_reader.read(path, LoraError)
    tensors = {}
    for name, tensor in stored.items():
        check_name(path, name)
        if tensor.dtype not in FLOATS:
            raise LoraError(
                f"{path}: {name} is stored as {tensor.dtype}, expected one of {', '.join(FLOATS)}"
            )
        tensors[name] = tensor.whole()
    for name, x in tensors.items():
        with np.errstate(over="ignore"):  # every reader takes float32, which F64 may not fit
            narrow = x if x.itemsize <= 4 else x.astype(np.float32)
        if not np.isfinite(narrow).all():
            raise LoraError(f"{path}: {name} holds numbers that are not finite (NaN or infinity)")
    return TensorFile(metadata, tensors)


class LazyTensor(NamedTuple):
    """An array that is made when it is written, so that only one is in memory at a time.

    name, shape, dtype: of the array.
    make: a function that returns it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """The bytes of the array in a file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write arrays under their names, in the order of the names."""
    lazy = [
        LazyTensor(name, x.shape, x.dtype, functools.partial(np.asarray, x))
        for name, x in sorted(tensors.items())
    ]
    write_lazily(path, lazy, metadata)


def write_lazily(
    path: pathlib.Path,
    tensors: Sequence[LazyTensor],
    metadata: Mapping[str, str],
    done: Callable[[int], None] = lambda size: None,
) -> None:
    """Write arrays in order, each as it is made; `done` gets the bytes of each afterwards."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    names = {dtype: name for name, dtype in FLOATS.items()}
    end = 0
    for x in tensors:
        span = [end, end + x.nbytes]
        header[x.name] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for x in tensors:
            array = np.ascontiguousarray(x.make())
            assert (array.shape, array.dtype) == (x.shape, x.dtype), x.name
            file.write(array.reshape(-1).view(np.uint8).data)
            done(x.nbytes)


def folder_writers(
    tensors_name: str,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    settings_name: str,
    settings: Mapping[str, Any],
) -> dict[str, FileWriter]:
    """Return the writers of a folder with tensors and settings, for `write_together`."""
    text = json.dumps(settings, indent=2) + "\n"
    return {
        tensors_name: lambda path: write(path, tensors, metadata),
        settings_name: lambda path: path.write_text(text),
    }


def pickle_error(path: pathlib.Path, converted: str) -> LoraError:
    """Return the error of a pickle, which is not opened, with the way to convert it."""
    return LoraError(
        f"{path} is a pickle, which can run any code when it is read, and is not opened. If you "
        "trust it, convert it in PyTorch:\n"
        f"    weights = torch.load({path.name!r}, weights_only=True)\n"
        f"    safetensors.torch.save_file(weights, {converted!r})"
    )


def digest(x: np.ndarray) -> str:
    """Return a hash of an array's dtype, shape and bytes."""
    x = np.ascontiguousarray(x)
    found = hashlib.sha256(f"{x.dtype}{x.shape}".encode())
    found.update(x.tobytes())
    return found.hexdigest()[:32]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object that may come from a stranger."""
    return json_file.read(path, LoraError)


def parse_json(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    """Read a JSON object from a text in the file at `path`; see `read_json`."""
    return json_file.parse_object(text, str(path), LoraError)


def check_finite(place: object, name: str, x: np.ndarray) -> None:
    """Raise `LoraError` unless an array in memory holds finite floats."""
    if x.dtype.kind not in "fV" or not np.isfinite(x.astype(np.float32)).all():
        raise LoraError(f"{place}: {name} of {x.dtype} holds no finite floats")


def check_name(path: pathlib.Path, name: str) -> None:
    """Raise `LoraError` for a name that no module can have."""
    odd = not name or ".." in name or "/" in name or "\\" in name or not name.isprintable()
    if odd or len(name) > LONGEST:
        raise LoraError(f"{path}: {shown(name)!r} is not the name of a module's tensor")


def shown(value: Any) -> str:
    """Return a value from a file, cut to fit into a message."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"
