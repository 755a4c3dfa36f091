"""Mixtures of adapters in the models of this package."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import Layout, paths
from lora_jax.multi.moe.statistics import Load, probe
from tests import cases
from tests.moe.test_router import members_of, wave
from tests.programs import compiled
from tests.test_built_in_models import BERT, LLAMA, built
from tests.test_transform import assert_close

pytestmark = pytest.mark.standard_promotion

TARGETS = ("**/{q,query,down}/kernel",)  # in either model


def drawn(config: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """A model, its parameters and its arguments, which are made without compiling a program."""
    found: list[Any] = []

    def shapes() -> Any:
        found.extend(built(config))
        return found[1]

    params = jax.tree.map(lambda x: wave(x.shape, x.size), jax.eval_shape(shapes))
    return found[0], params, found[2]


def layer_of(path: str) -> tuple[str, int | None]:
    """Split a path: `layers_1/mlp/up` is slice 1 of `layers/mlp/up`."""
    found = re.search(r"layers?_(\d+)", path)
    return re.sub(r"layers?_\d+", "layers", path), int(found[1]) if found else None


def scanned(tree: dict[str, Any], axis: int) -> dict[str, Any]:
    """Stack the layers of `{path: arrays}` of an unrolled model along `axis`."""
    slices: dict[str, list[Any]] = {}
    for path, value in tree.items():
        whole, layer = layer_of(path)
        slices.setdefault(whole, []).append(value)
        assert layer in (None, len(slices[whole]) - 1)
    put = lambda *x: jnp.stack(x, axis) if len(x) > 1 else x[0]  # noqa: E731
    return {path: jax.tree.map(put, *values) for path, values in slices.items()}


@pytest.mark.few(1)
@pytest.mark.parametrize("config", [BERT, LLAMA], ids=["bert", "llama"])
def test_scanned_layers_route_as_unrolled_ones(config: Any) -> None:
    """Scanned layers with full remat have the outputs, loads and gradients of unrolled ones."""
    f, params, args = drawn(config)
    case = cases.Case("", f, params, args, TARGETS)
    members = members_of(case, (1, 2))
    layout, stacked = compiled(lora_jax.multi.stack, members)
    router = lora_jax.moe.init_router(jax.random.key(0), layout, 2)

    deep, deep_params, _ = drawn(dataclasses.replace(config, scan_layers=True, remat="full"))
    flat = scanned(paths.flatten(params), 0)
    deep_params = paths.replace(deep_params, flat)
    deep_case = cases.Case("", deep, deep_params, args, TARGETS)
    deep_layout, deep_stacked = lora_jax.multi.stack(members_of(deep_case, (1, 2)))
    deep_stacked = dataclasses.replace(deep_stacked, factors=scanned(stacked.factors, 1))

    def derived(layout: Layout, f: Any, params: Any, stacked: Any, router: Any) -> Any:
        g = lora_jax.adapt(layout, f)

        def values(router: Any, zeros: Any) -> Any:
            routed = lora_jax.moe.route(stacked, router, 2)
            out = g(params, dataclasses.replace(routed, probe=zeros), *args)
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

        fn = jax.jit(jax.value_and_grad(values, (0, 1), has_aux=True))
        (_, out), (gradient, sums) = fn(router, probe(layout, 2))
        return out, gradient, {path: Load.from_tally(each) for path, each in sums.items()}

    out, gradient, loads = derived(layout, f, params, stacked, router)
    deep_router = scanned(router, 0)
    deep_out, *rest = derived(deep_layout, deep, deep_params, deep_stacked, deep_router)
    assert_close(deep_out, out, 2e-5)
    assert_close(tuple(rest), (scanned(gradient, 0), scanned(loads, 0)), 5e-5)
    routed = lora_jax.moe.route(deep_stacked, deep_router, 2)
    count = lambda p, r: lora_jax.moe.router_load(deep_layout, deep, p, r, *args)  # noqa: E731
    asked = jax.jit(count)(deep_params, routed)
    assert_close(asked, rest[1])
    assert all(jnp.allclose(x.sum(-1), 1, atol=1e-5) for x in jax.tree.leaves(asked))


def test_weights_per_example_of_a_model() -> None:
    f, params, args = drawn(dataclasses.replace(BERT, scan_layers=True))
    case = cases.Case("", f, params, args, TARGETS)
    layout, stacked = lora_jax.multi.stack(members_of(case, (1, 2)))
    g, weights = lora_jax.adapt(layout, f), jnp.array([[0.3, 0.7], [1.0, -1.0]])
    rows = [[x[i : i + 1] for x in args] for i in range(2)]
    alone = [
        lambda i=i: g(params, lora_jax.moe.mix(stacked, weights[i]), *rows[i]) for i in range(2)
    ]
    together = jax.jit(lambda w: g(params, lora_jax.moe.mix(stacked, w), *args))(weights)
    assert_close(together, jax.jit(lambda: jnp.concatenate([fn() for fn in alone]))(), 2e-5)
