"""Adapter dropout: a mask by hand, many programs, mixed batches, and repeatable bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Factors, LoraError, LoraSpec
from lora_jax.multi import BASE, dropout, select, stack
from tests import cases
from tests.cases import normal
from tests.test_transform import assert_close, weighted

KEY = jax.random.key(5)
RATE = 0.4
PROGRAMS = [
    "bare_matmul",
    "bare_used_both_ways",
    "bare_batched_product",
    "bare_ragged_dot",
    "bare_vmap_over_weights",
    "bare_custom_jvp",
    "bare_checkpoint_dots",
    "bare_while",
    "bare_scan",
    "bare_fused_reshape",
    "linen_conv_grouped",
    "linen_attention",
    "nnx_scan",
    "shard_map_over_scanned_layers",
]


def drawn(layout: lora_jax.Layout, params: Any = None, seed: int = 3) -> Any:
    make = lambda: lora_jax.init(jax.random.key(0), layout, params=params)  # noqa: E731
    draw = np.random.default_rng(seed).standard_normal
    drawn = jax.tree.map(lambda x: (0.3 * draw(x.shape)).astype(x.dtype), jax.eval_shape(make))
    return jax.device_put(drawn)


def seen(f: Any, layout: Any, params: Any, key: Any, x: Any, rate: float = RATE) -> np.ndarray:
    """Read drop(x) off a program with W = 0 and identities for a and b (the target is square)."""
    (t,) = layout.targets
    n = t.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(n), (*t.shape[:-2], n, n))
    big = lora_jax.Layout((dataclasses.replace(t, rank=n, alpha=float(n)),))
    zero = jax.tree.map(jnp.zeros_like, params)
    g = lora_jax.adapt(big, f)
    return np.asarray(g(zero, dropout({t.path: Factors(eye, eye)}, key, rate), x))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "vera", "dora"])
def test_value_and_gradients_with_the_mask_by_hand(kind: str) -> None:
    f = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": normal(0, 12, 12)}, normal(1, 50, 12)
    layout = lora_jax.resolve(LoraSpec(2, 4.0, "w", kind=kind), f, params, x)
    plain = lora_jax.resolve(LoraSpec(2, 4.0, "w"), f, params, x)
    dropped = seen(f, plain, params, KEY, x)
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], np.asarray(x)[kept] / (1 - RATE), rtol=1e-6)
    assert abs(kept.mean() - (1 - RATE)) < 0.06
    own = lora_jax.updates.kind_of(layout["w"])
    adapters = drawn(layout, params)

    def by_hand(ad: Any, params: Any, x: Any) -> Any:
        mask = jnp.asarray(kept, x.dtype) / (1 - RATE)
        factors = own.factors(layout["w"], ad["w"])
        y = x @ params["w"] + own.scale(layout["w"]) * (mask * x) @ factors.a @ factors.b
        gain = own.gains(layout["w"], ad["w"], params["w"]).outputs
        return y if gain is None else y * gain[None]

    g = lora_jax.adapt(layout, f)
    fast = lambda ad, params, x: g(params, dropout(ad, KEY, RATE), x)  # noqa: E731

    def both(fn: Any) -> Any:
        loss = lambda ad, x: weighted(fn(ad, params, x))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(adapters, x)

    assert_close(both(fast), both(by_hand))


@pytest.mark.few(4)
@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs(name: str) -> None:
    case = cases.REGISTRY[name]()
    layout = lora_jax.resolve(LoraSpec(2, 3.0, case.targets), case.f, case.params, *case.args)
    adapters, g = drawn(layout), lora_jax.adapt(layout, case.f)

    def loss(ad: Any, key: Any) -> Any:
        return weighted(g(case.params, dropout(ad, key, RATE), *case.args))

    value = jax.jit(loss)
    assert value(adapters, KEY) == value(adapters, jax.random.key(5))
    assert value(adapters, KEY) != value(adapters, jax.random.key(6))
    assert value(adapters, KEY) != weighted(g(case.params, adapters, *case.args))
    tangent = jax.tree.map(jnp.cos, adapters)
    _, slope = jax.jvp(lambda ad: loss(ad, KEY), (adapters,), (tangent,))
    if case.reverse:
        grads = jax.jit(jax.grad(loss))(adapters, KEY)
        total = sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), grads, tangent)))
        np.testing.assert_allclose(slope, total, rtol=2e-4, atol=1e-5)
    step = 2e-3
    ends = [
        value(jax.tree.map(lambda x, t, s=s: x + s * step * t, adapters, tangent), KEY)
        for s in (-1, 1)
    ]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / (2 * step), rtol=2e-2, atol=5e-2)


def test_every_layer_use_and_target_has_its_own_mask() -> None:
    x = jnp.ones((64, 8))

    def f(p: Any, x: Any) -> Any:
        layers = jax.lax.scan(lambda c, w: (c, c @ w), x, p["layers"])[1]
        twice = jax.checkpoint(lambda w, x: (x @ w, jnp.sin(x) @ w))
        return layers, twice(p["one"], x), x @ p["two"]

    params = {"layers": jnp.zeros((3, 8, 8)), "one": jnp.zeros((8, 8)), "two": jnp.zeros((8, 8))}
    layout = lora_jax.resolve(LoraSpec(8, 8.0, tuple(params)), f, params, x)
    eye = jax.tree.map(lambda w: Factors(*[jnp.broadcast_to(jnp.eye(8), w.shape)] * 2), params)
    layers, one, two = lora_jax.adapt(layout, f)(params, dropout(eye, KEY, 0.5), x)
    masks = [np.asarray(y) != 0 for y in (*layers, *one, two)]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert 0.35 < (first == second).mean() < 0.65


def test_the_masks_of_a_target_do_not_depend_on_the_others() -> None:
    f = lambda p, x: (x @ p["v"], x @ p["w"])  # noqa: E731
    params, x = {"v": normal(0, 8, 8), "w": normal(1, 8, 8)}, normal(2, 6, 8)
    both = lora_jax.resolve(LoraSpec(2, 3.0, ("v", "w")), f, params, x)
    adapters, alone = drawn(both), both.subset("w")
    got = lora_jax.adapt(both, f)(params, dropout(adapters, KEY, RATE), x)[1]
    only = dropout({"w": adapters["w"]}, KEY, RATE)
    np.testing.assert_array_equal(got, lora_jax.adapt(alone, f)(params, only, x)[1])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_rate_zero_is_no_dropout_and_the_mean_is_the_output_without(kind: str) -> None:
    f = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": normal(0, 10, 14)}, normal(1, 3, 10)
    layout = lora_jax.resolve(LoraSpec(2, 4.0, "w", kind=kind), f, params, x)
    adapters, g = drawn(layout, params), lora_jax.adapt(layout, f)
    assert dropout(adapters, None, 0.0) is adapters
    keys = jax.random.split(KEY, 4000)
    run = jax.jit(jax.vmap(lambda key: g(params, dropout(adapters, key, RATE), x)))
    want = g(params, adapters, x)
    found = run(keys)
    error = jnp.abs(found.mean(0) - want) / (found.std(0) / len(keys) ** 0.5)
    assert float(error.max()) < 5


@pytest.mark.few(1)
@pytest.mark.parametrize("examples", [4, 40])
def test_in_a_mixed_batch_every_example_has_its_own_mask(examples: int) -> None:
    """In a mixed batch, each example equals the example alone with the folded key."""
    f = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    params = {"v": normal(0, 64, 64), "w": normal(1, 64, 64)}
    x = jnp.tile(normal(2, 1, 3, 64), (examples, 1, 1))
    members = []
    for rank in (1, 3):
        layout = lora_jax.resolve(LoraSpec(rank, 4.0, ("v", "w")), f, params, x)
        members.append((layout, drawn(layout, seed=rank)))
    layout, stacked = stack(members)
    g = lora_jax.adapt(layout, f)
    ids = jnp.arange(examples) % 3 - 1
    got = jax.jit(lambda x: g(params, dropout(select(stacked, ids), KEY, RATE), x))(x)
    assert len({float(y.sum()) for y in got[ids == 1]}) == int((ids == 1).sum())
    for i in range(4):
        own = dropout(select(stacked, ids[i]), jax.random.fold_in(KEY, i), RATE)
        np.testing.assert_allclose(got[i], g(params, own, x[i : i + 1])[0], rtol=1e-4, atol=1e-4)
    base = f(params, x)
    np.testing.assert_allclose(got[ids == BASE], base[ids == BASE], rtol=1e-5, atol=1e-5)


def test_mixtures_and_routers_take_it() -> None:
    f = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": normal(0, 10, 14)}, normal(1, 6, 10)
    layout = lora_jax.resolve(LoraSpec(2, 4.0, "w"), f, params, x)
    both, stacked = stack([(layout, drawn(layout, seed=i)) for i in range(2)])
    g = lora_jax.adapt(both, f)
    one = g(params, dropout(lora_jax.moe.mix(stacked, [1.0, 0.0]), KEY, RATE), x)
    want = g(params, dropout(select(stacked, 0), KEY, RATE), x)
    np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-5)
    router = lora_jax.moe.init_router(jax.random.key(1), both, 2)
    routed = lora_jax.moe.route(stacked, router, top=1)
    assert not np.allclose(g(params, dropout(routed, KEY, RATE), x), g(params, routed, x))


def test_what_is_no_rate() -> None:
    for rate in (1, -0.1, 1.5):
        with pytest.raises(LoraError, match=r"a Python number in \[0, 1\)"):
            dropout({}, KEY, rate)
    with pytest.raises(LoraError, match="needs a key"):
        dropout({}, None, 0.1)
    old = dropout({}, jax.random.key_data(KEY), 0.1)
    np.testing.assert_array_equal(jax.random.key_data(old.key), jax.random.key_data(KEY))
