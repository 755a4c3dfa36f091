"""Content hashes of arrays, computed on their devices.

They do not depend on the mesh, the number of processes or the float width.

The hash of an array is two sums modulo 2^32 over its elements, each of

    mix(bits of the element ^ mix(linear index of the element ^ seed))

with murmur3's finalizer as `mix` and one seed for each sum. The order of a sum does not matter, so
every device sums its own shard, and devices exchange two numbers each. No weight is gathered, and
the result is the same on any mesh. `mix` is a bijection, so a change of one element always changes
the hash; a change of several goes unseen with probability 2^-64. The hash finds accidents, not
forgeries: it is not cryptographic.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding

from lora_jax import paths
from lora_jax.base import is_base
from lora_jax.errors import LoraError, listed

K = TypeVar("K")
Fingerprint = Mapping[str, Mapping[str, Any]]  # path -> {"shape": [...], "hash": "16 hex digits"}

_SEEDS = (0x9E3779B9, 0x7F4A7C15)
SMALL = 2**16  # elements; NumPy hashes fewer than these before XLA has compiled a program


def fingerprint(params: Any) -> dict[str, dict[str, Any]]:
    """Return the shape and content hash of every parameter, to tell one base from another.

    Floats are rounded to bfloat16 first (and denormals to zero), so a bfloat16 copy of float32
    weights has the same fingerprint. The result is JSON: `lora_jax.save(..., fingerprint=...)`
    stores it with an adapter, and `lora_jax.restore(..., params=...)` compares it. For a quantised
    weight, the codes and scales are hashed, so its hash differs from that of its floats.

    Args:
      params: a pytree of arrays, sharded or not. None leaves are left out, so that
        `fingerprint(frozen.split(params, ...)[1])` covers only the frozen parameters.

    Returns:
      `{path: {"shape": [...], "hash": "16 hex digits"}}`

    >>> import jax.numpy as jnp
    >>> fingerprint({"w": jnp.ones((2, 3))})
    {'w': {'shape': [2, 3], 'hash': '0c9455f738b5344d'}}
    >>> wide, narrow = jnp.linspace(0, 1, 7), jnp.linspace(0, 1, 7).astype(jnp.bfloat16)
    >>> fingerprint({"w": wide}) == fingerprint({"w": narrow})
    True
    """
    leaves = paths.flatten(params)
    parts = {(p, i): x for p, leaf in leaves.items() for i, x in enumerate(jax.tree.leaves(leaf))}
    hashes: dict[str, list[str]] = {path: [] for path in leaves}
    for (path, _), found in _hashes(parts, rounded=True).items():
        hashes[path].append(found)
    return {p: {"shape": _shape(leaves[p]), "hash": _joined(h)} for p, h in hashes.items()}


class PartwiseFingerprint:
    """The fingerprint of one parameter that comes in parts, which need not fit in memory at once.

    The parts are float arrays that follow each other in memory: slices along the leading axes.

    >>> whole, parts = jnp.arange(6.0).reshape(2, 3), PartwiseFingerprint((2, 3))
    >>> for part in whole:
    ...     parts.add(part)
    >>> parts.value == fingerprint({"w": whole})["w"]
    True
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape, self._sums, self._start = list(shape), [0 for _ in _SEEDS], 0

    def add(self, part: jax.Array) -> None:
        found = jax.device_get(_sums(part, True, jnp.uint32(self._start % 2**32)))
        self._sums = [(x + int(y)) % 2**32 for x, y in zip(self._sums, found, strict=True)]
        self._start += part.size

    @property
    def value(self) -> dict[str, Any]:
        """The shape and the hash of the parts added so far."""
        return {"shape": self._shape, "hash": "".join(f"{x:08x}" for x in self._sums)}


def _shape(leaf: Any) -> list[int]:
    return list(leaf.shape if is_base(leaf) else jnp.shape(leaf))


def _joined(hashes: list[str]) -> str:
    """Return one hash for the hashes of a quantised weight's arrays."""
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.blake2s("".join(hashes).encode(), digest_size=8).hexdigest()


def digests(tree: Any) -> dict[str, str]:
    """Return `{path: 16 hex digits}` of the exact bits of every leaf; for PRNG keys, of their data.

    Only the width of the dtype enters the hash, so store the dtype as well.
    """
    return _hashes(paths.flatten(tree), rounded=False)


def check_base(stored: Fingerprint, ours: Fingerprint, allow: bool, what: str) -> None:
    """Raise unless two fingerprints are of one base, or `allow`; `what` names the checkpoint.

    Neither contains parameters that were trained with the adapters.
    """
    if allow:
        return
    if not is_fingerprint(stored):
        raise LoraError(
            f"{what} has a fingerprint that is not one: {str(stored)[:80]}; expected "
            '{path: {"shape": [...], "hash": "..."}}. Pass allow_other_base=True to do without '
            "(on a command line: --allow-other-base)"
        )
    found = differences(stored, ours)
    if found:
        raise LoraError(
            f"{what} was trained on another base: {len(found)} of "
            f"{len({*stored, *ours})} frozen parameters differ:\n{listed(found)}\n"
            "Load the base that it was trained on; to go on with this one all the same, pass "
            "allow_other_base=True (on a command line: --allow-other-base)"
        )


def is_fingerprint(value: Any) -> bool:
    """Return whether a value, which may come from a stranger, has the form of a fingerprint."""
    return isinstance(value, Mapping) and all(
        isinstance(one, Mapping)
        and isinstance(one.get("shape"), list | tuple)
        and isinstance(one.get("hash"), str)
        for one in value.values()
    )


def differences(stored: Fingerprint, ours: Fingerprint) -> list[str]:
    """Return a line for each parameter in which two fingerprints differ."""
    lines = []
    for path in dict.fromkeys([*stored, *ours]):
        old, new = stored.get(path), ours.get(path)
        if old is None:
            lines.append(f"{path}: there was none of that name")
        elif new is None:
            lines.append(f"{path}: there is none of that name here")
        elif list(old["shape"]) != list(new["shape"]):
            lines.append(f"{path}: shape {list(old['shape'])}, here {list(new['shape'])}")
        elif old["hash"] != new["hash"]:
            lines.append(f"{path}: other values (hash {old['hash']}, here {new['hash']})")
    return lines


def _hashes(leaves: Mapping[K, Any], rounded: bool) -> dict[K, str]:
    """Return the hash of each leaf, with up to eight leaves computed at a time.

    They are not all started at once: JAX 0.10.2 on CPU allows at most 32 programs with collectives
    between processes to be in flight, and hangs at the next one.
    """
    found, under_way = dict[K, str](), deque[tuple[K, tuple[Any, ...]]]()

    def take() -> None:
        path, sums = under_way.popleft()
        found[path] = "".join(f"{int(x):08x}" for x in jax.device_get(sums))

    for path, leaf in leaves.items():
        under_way.append((path, _send(leaf, rounded)))
        if len(under_way) > 8:
            take()
    while under_way:
        take()
    return found


def _send(leaf: Any, rounded: bool) -> tuple[Any, ...]:
    """Start the sums of a leaf under its own mesh; `jax.set_mesh` may name other devices."""
    if not isinstance(leaf, jax.Array):
        return _sums(leaf, rounded)
    if not rounded and leaf.is_fully_addressable and leaf.size <= SMALL:
        plain = _plain(leaf)
        if jax.dtypes.itemsize_bits(plain.dtype) >= 8:
            return _exact_sums(np.asarray(plain))
    with jax.set_mesh(_own_mesh(leaf.sharding)):
        return _sums(_plain(leaf), rounded)


def _own_mesh(place: jax.sharding.Sharding) -> Mesh:
    if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh):
        return place.mesh
    devices: Any = sorted(place.device_set, key=str)
    return Mesh(devices, ("devices",))


def _plain(leaf: jax.Array) -> jax.Array:
    key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if key else leaf


@functools.partial(jax.jit, static_argnums=1)
def _sums(x: jax.Array, rounded: bool, start: Any = 0) -> tuple[jax.Array, ...]:
    """Return two [] uint32 sums, replicated so that every process can read them."""
    words = _rounded_words(x) if rounded else _words(x)
    where = _linear_index(words.shape) + jnp.uint32(start)
    terms = tuple(_mix(words ^ _mix(where ^ jnp.uint32(seed))) for seed in _SEEDS)
    # One reduction for both sums: for a plain `sum`, XLA on CPU writes every term to memory first.
    zeros = (jnp.uint32(0),) * len(terms)
    return lax.reduce(terms, zeros, _add, tuple(range(words.ndim)))


def _exact_sums(x: np.ndarray) -> tuple[int, ...]:
    """Compute `_sums` of the exact bits by NumPy; a program for each shape would take longer."""
    words = np.ascontiguousarray(x).reshape(-1).view(f"u{min(x.itemsize, 4)}").astype(np.uint32)
    where = np.arange(words.size, dtype=np.uint32)
    terms = (_mix(words ^ _mix(where ^ np.uint32(seed))) for seed in _SEEDS)
    return tuple(int(np.sum(term, dtype=np.uint32)) for term in terms)


def _add(x: tuple[jax.Array, ...], y: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(i + j for i, j in zip(x, y, strict=True))


def _rounded_words(x: jax.Array) -> jax.Array:
    """Return the bits of floats rounded to bfloat16; for other dtypes, the bits as they are."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_rounded_words(x.real), _rounded_words(x.imag)], axis=-1)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return _words(x)
    words = _words(x.astype(jnp.bfloat16))
    # Some processors flush denormals (an exponent of zero) to zero, and some do not.
    return jnp.where(words & jnp.uint32(0x7F80) == 0, jnp.uint32(0), words)


def _words(x: jax.Array) -> jax.Array:
    """Return the bits as uint32: one word per element, or more along a new last axis."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(x.real), _words(x.imag)], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    bits = jax.dtypes.itemsize_bits(x.dtype)
    if bits < 8:  # exact in the next wider type; sub-byte bitcasts are not available everywhere
        x = x.astype(jnp.int8 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32)
        bits = jax.dtypes.itemsize_bits(x.dtype)
    unsigned = {8: jnp.uint8, 16: jnp.uint16}.get(bits, jnp.uint32)
    return lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _linear_index(shape: tuple[int, ...]) -> jax.Array:
    """Return the row-major index of each element, modulo 2^32."""
    out = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        out = out + lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return out


def _mix(x: Any) -> Any:
    """Apply murmur3's 32-bit finalizer: a bijection in which each bit affects all others."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
