"""The manifest of a checkpoint, and the limits within which it is trusted.

A manifest lists every array with shape, dtype and content hash (`fingerprint.digests`), and holds
the notes of the saver: JSON values. It is stored as one text together with the SHA-256 of that
text. So a flipped bit in either is found, just as a flipped bit in an array is found by its hash.

A checkpoint may come from a stranger. No memory is allocated for an array before
`lora_jax.checkpoint.folder.check`, `check_declared` and `check_stored` have passed. The last two
refuse the following, and name the declared value and the limit:

    a path with a segment `..` or `.`, an absolute path, one with a NUL character;
    more than 32 dimensions, a dimension that is not an integer or is negative;
    an array in the folder that the manifest does not list, or with another shape or dtype;
    arrays of more bytes in all than `max_bytes`. Without a limit from the caller, that is 16 GiB,
    and at most 1,000 times the bytes on disk or 256 MiB, the larger of the two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.checkpoint.fingerprint import digests
from lora_jax.errors import DamagedError, LoraError, listed

FORMAT = 1
SEALED = {"text", "sha256"}  # the fields of a sealed manifest
DIMENSIONS = 32
KEY_WORDS = 4  # the words of JAX's largest PRNG key
MOST_BYTES = 2**34
ANY_FOLDER = 2**28  # bytes that a folder of any size may declare
RATIO = 1_000  # declared bytes per byte on disk; arrays of zeros compress well


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array of a manifest.

    shape, dtype: as the array has them, the dtype by its name.
    """

    shape: tuple[int, ...]
    dtype: str
    hash: str

    @property
    def kind(self) -> str:
        """The dtype and shape as text: `float32[2, 3]`."""
        return f"{self.dtype}{list(self.shape)}"

    @property
    def nbytes(self) -> int:
        """The bytes in memory. A PRNG key, whose dtype has no size, counts one word per element."""
        item = 4 if self.dtype.startswith("key<") else jnp.dtype(self.dtype).itemsize
        return math.prod(self.shape) * item


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The arrays by path, and the notes that were saved with them."""

    arrays: dict[str, Entry]
    notes: Any

    def seal(self) -> dict[str, str]:
        """Return the JSON value to store."""
        arrays = {p: [list(e.shape), e.dtype, e.hash] for p, e in self.arrays.items()}
        text = json.dumps({"format": FORMAT, "arrays": arrays, "notes": self.notes})
        return {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}

    def damaged(self, tree: Any) -> list[str]:
        """Return a line for each leaf of `tree` that differs from the one saved at its path."""
        found, lines = of(tree, None).arrays, []
        for path, entry in found.items():
            saved = self.arrays[path]
            if (entry.shape, entry.dtype) != (saved.shape, saved.dtype):
                lines.append(f"{path} is {entry.kind}, and was saved as {saved.kind}")
            elif entry.hash != saved.hash:
                both = f"(hash {entry.hash}, saved {saved.hash})"
                lines.append(f"{path} holds other bits than were saved {both}")
        return lines


def of(tree: Any, notes: Any) -> Manifest:
    """Return the manifest of the arrays in `tree`, hashed on their devices."""
    leaves, hashes = paths.flatten(tree), digests(tree)
    return Manifest({p: Entry(x.shape, str(x.dtype), hashes[p]) for p, x in leaves.items()}, notes)


def unseal(stored: Any) -> Manifest:
    """Return the manifest of a stored JSON value: the inverse of `Manifest.seal`."""
    if not isinstance(stored, Mapping) or not isinstance(stored.get("text"), str):
        raise DamagedError("its meta has no manifest: it is torn")
    if set(stored) != SEALED:
        raise DamagedError(f"its meta does not hold {sorted(SEALED)} and nothing else")
    text = stored["text"]
    found = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    if found != stored.get("sha256"):
        raise DamagedError(
            f"its meta is not what was saved (SHA-256 {found}, saved {str(stored['sha256'])[:80]})"
        )
    data = json.loads(text)
    if data.get("format") != FORMAT:
        raise LoraError(
            f"it has format {data.get('format')}, this lora_jax reads {FORMAT}; use the lora_jax "
            "that wrote it, or a newer one"
        )
    return Manifest({p: _entry(p, row) for p, row in data["arrays"].items()}, data["notes"])


def _entry(path: str, row: Any) -> Entry:
    check_path(path)
    shape, dtype, digest = row
    check_shape(path, shape)
    if not isinstance(dtype, str) or not isinstance(digest, str):
        raise LoraError(f"{path!r} is declared as {row!r}; expected [shape, dtype, hash]")
    return Entry(tuple(shape), dtype, digest)


def check_path(path: str) -> None:
    """Raise `LoraError` for a path that could lead out of a folder."""
    if path.startswith("/") or "\0" in path or {"..", "."} & set(path.split("/")):
        raise LoraError(f"it names a parameter {path!r}, which could lead out of its folder")


def check_shape(path: str, shape: Any) -> None:
    """Raise `LoraError` unless `shape` is the shape of a possible array."""
    sizes = isinstance(shape, list | tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not sizes or len(shape) > DIMENSIONS:
        raise LoraError(
            f"{path!r} is declared with the shape {str(shape)[:80]}; expected at most "
            f"{DIMENSIONS} dimensions, each an integer of at least 0"
        )


def check_declared(manifest: Manifest, on_disk: int | None, max_bytes: float | None) -> None:
    """Raise if the declared arrays take more than `max_bytes`, or else the documented limits.

    `on_disk` are the bytes in the folder; None if they are unknown (remote storage).
    """
    declared = sum(entry.nbytes for entry in manifest.arrays.values())
    most = MOST_BYTES if max_bytes is None else max_bytes
    if max_bytes is None and on_disk is not None:
        most = min(most, max(ANY_FOLDER, RATIO * on_disk))
    if declared > most:
        largest = sorted(manifest.arrays.items(), key=lambda item: -item[1].nbytes)
        rows = [f"{p}: {e.kind}, {e.nbytes:,} bytes" for p, e in largest]
        raise LoraError(
            f"it declares arrays of {declared:,} bytes"
            + ("" if on_disk is None else f" in a folder of {on_disk:,} bytes")
            + f"; the limit is {most:,}:\n{listed(rows, 3)}\n"
            f"If that is meant, pass max_bytes={declared} or more."
        )


class StoredArray(NamedTuple):
    """The description of an array on disk: its shape, its dtype by name, the shape of a chunk."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]


def check_stored(manifest: Manifest, stored: Mapping[str, StoredArray]) -> None:
    """Raise unless the folder holds the arrays that are listed, in chunks of a sane size."""
    if extra := [path for path in stored if path not in manifest.arrays]:
        raise DamagedError(f"it holds arrays that its manifest does not list:\n{listed(extra)}")
    for path, entry in manifest.arrays.items():
        if path not in stored:
            raise DamagedError(f"damaged: the array {path} is missing")
        _check_array(path, entry, stored[path])


def _check_array(path: str, entry: Entry, found: StoredArray) -> None:
    shape, dtype, chunk = found
    if entry.dtype.startswith("key<"):  # a PRNG key is stored as words, with one more dimension
        fits = dtype == "uint32" and shape[:-1] == entry.shape and shape[-1] <= KEY_WORDS
    else:
        fits = (shape, dtype) == (entry.shape, entry.dtype)
    if not fits:
        raise DamagedError(
            f"damaged: {path} is {dtype}{list(shape)}, and was saved as {entry.kind}"
        )
    if math.prod(chunk) > max(1, math.prod(shape)):
        raise LoraError(
            f"{path} has the shape {list(shape)}, and is stored in chunks of {list(chunk)}; a "
            "chunk may not be larger than its array"
        )


def canonical(x: Any) -> jax.Array:
    """Return a leaf as the JAX array to hash and store: a NumPy float64 becomes float32."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x)
