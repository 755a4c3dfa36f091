"""A hash that depends on every bit, and a fingerprint that ignores the mesh and the float width."""

from __future__ import annotations

import importlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_jax import LoraError
from lora_jax.checkpoint.fingerprint import (
    _sums,
    check_base,
    differences,
    digests,
    fingerprint,
)

# In the package, the function of the same name hides this module.
MODULE = importlib.import_module("lora_jax.checkpoint.fingerprint")
SHAPE = (8, 4, 6)
NAMES = ("data", "fsdp", "tensor")


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def mesh(*sizes: int, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    count = int(np.prod(sizes))
    devices = jax.devices()[:count]
    return jax.make_mesh(sizes, NAMES, axis_types=(kind,) * 3, devices=devices)


def mixed(x: int) -> int:
    """The finalizer of Murmur3 on a Python integer."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def slow(words: list[int], seed: int) -> int:
    return sum(mixed(w ^ mixed(i ^ seed)) for i, w in enumerate(words)) % 2**32


@pytest.fixture
def by_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash every array by XLA, as large arrays are."""
    monkeypatch.setattr(MODULE, "SMALL", -1)


@pytest.mark.parametrize("small", [-1, MODULE.SMALL])
def test_the_definition(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "SMALL", small)
    x = weights()
    words = [int(w) for w in x.view(np.uint32).ravel()]
    expected = f"{slow(words, 0x9E3779B9):08x}{slow(words, 0x7F4A7C15):08x}"
    assert digests({"x": jnp.asarray(x)}) == {"x": expected}


@pytest.mark.matrix
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool", "complex64", "int4"]
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)])
def test_small_arrays_have_the_hash_of_large_ones(
    dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = jnp.asarray(3 * np.random.default_rng(1).standard_normal(shape)).astype(dtype)
    found = digests([x])
    monkeypatch.setattr(MODULE, "SMALL", -1)
    assert digests([x]) == found


@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        ((8, 1, 1), P("data")),
        ((1, 8, 1), P("fsdp")),
        ((2, 2, 2), P("data", "fsdp", "tensor")),
        ((2, 2, 2), P(("tensor", "data"), None, "fsdp")),
        ((1, 2, 4), P()),
    ],
    ids=str,
)
def test_the_mesh_does_not_matter(sizes: Any, spec: Any, kind: AxisType) -> None:
    x = jnp.asarray(weights())
    sharded = jax.device_put(x, NamedSharding(mesh(*sizes, kind=kind), spec))
    assert digests([sharded]) == digests([x])
    assert fingerprint([sharded]) == fingerprint([x])


def test_no_weight_is_gathered() -> None:
    """In the HLO, at most one number for each device and seed crosses devices."""
    place = NamedSharding(mesh(2, 2, 2), P("data", "fsdp", "tensor"))
    text = _sums.lower(jax.device_put(jnp.asarray(weights()), place), False).compile().as_text()
    moved = re.findall(r"= (.*?) (?:all-|collective-|reduce-scatter|ragged-)[a-z-]*\(", text)
    sizes = [re.search(r"\[([\d,]*)\]", result) for result in moved]
    numbers = [int(np.prod([int(n) for n in found[1].split(",") if n])) for found in sizes if found]
    assert numbers and max(numbers) <= 8, moved


def test_no_copy_is_made() -> None:
    compiled = _sums.lower(jax.ShapeDtypeStruct((256, 1024), jnp.float32), True).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024


@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize("bit", [0, 15, 31])
@pytest.mark.parametrize("place", [0, 77, 191])
def test_every_bit_counts(bit: int, place: int) -> None:
    x = weights()
    x.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
    assert digests([jnp.asarray(x)]) != digests([jnp.asarray(weights())])


def test_places_count() -> None:
    x = weights()
    x[0, 0, 0], x[7, 3, 5] = x[7, 3, 5], x[0, 0, 0]
    assert digests([jnp.asarray(x)]) != digests([jnp.asarray(weights())])
    assert digests([jnp.asarray(x[::-1].copy())]) != digests([jnp.asarray(x)])


def test_a_bfloat16_copy_has_the_fingerprint_of_its_source() -> None:
    x = jnp.asarray(weights())
    narrow = x.astype(jnp.bfloat16)
    assert fingerprint({"w": narrow}) == fingerprint({"w": x})
    assert digests({"w": narrow}) != digests({"w": x})
    other = narrow.at[1, 2, 3].multiply(jnp.bfloat16(1.01))
    assert fingerprint({"w": other}) != fingerprint({"w": x})


def test_denormals_and_zeros_are_one() -> None:
    zero = fingerprint([jnp.zeros(3)])
    assert fingerprint([jnp.array([1e-40, -0.0, -1e-39], jnp.float32)]) == zero
    assert digests([jnp.array([0.0, -0.0, 0.0])]) != digests([jnp.zeros(3)])


@pytest.mark.parametrize(
    "dtype", ["int4", "uint2", "int8", "bool", "float8_e4m3fn", "float4_e2m1fn", "complex64"]
)
def test_every_dtype(dtype: str) -> None:
    one, other = (jnp.asarray(np.array(x)).astype(dtype) for x in ([0, 1, 1, 0], [0, 1, 0, 1]))
    assert digests([one]) != digests([other])
    assert fingerprint([one])["0"]["hash"] != fingerprint([other])["0"]["hash"]
    assert fingerprint([one]) == fingerprint([jnp.copy(one)])


def test_prng_keys_and_scalars() -> None:
    assert digests([jax.random.key(1)]) == digests([np.asarray([0, 1], np.uint32)])
    assert digests([jax.random.key(1)]) == digests([jax.random.key_data(jax.random.key(1))])
    assert digests([jax.random.key(1)]) != digests([jax.random.key(2)])
    assert fingerprint({"s": jnp.float32(2), "hole": None})["s"]["shape"] == []


BASE = {"enc": {"q": jnp.ones((2, 3)), "v": jnp.ones(3)}, "emb": jnp.ones(4)}


def test_differences_are_named() -> None:
    ours = {"enc": {"q": jnp.ones((3, 2)), "v": jnp.zeros(3)}, "new": jnp.ones(4)}
    lines = differences(fingerprint(BASE), fingerprint(ours))
    assert [line.split(":")[0] for line in lines] == ["emb", "enc/q", "enc/v", "new"]
    assert "none of that name here" in lines[0] and "shape [2, 3], here [3, 2]" in lines[1]
    assert "other values" in lines[2] and "there was none" in lines[3]


def test_another_base_is_refused_unless_it_is_meant() -> None:
    stored = fingerprint(BASE)
    check_base(stored, fingerprint(BASE), allow=False, what="runs/x")
    other = fingerprint({**BASE, "emb": jnp.zeros(4)})
    with pytest.raises(LoraError, match=r"runs/x .*1 of 3 (.|\n)*emb(.|\n)*--allow-other-base"):
        check_base(stored, other, allow=False, what="runs/x")
    check_base(stored, other, allow=True, what="runs/x")
