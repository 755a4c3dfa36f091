"""The centre of the suite: `adapt == merge`, in outputs and in gradients, for every case."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from tests import cases, programs

RANK = 2
pytestmark = pytest.mark.standard_promotion  # Flax and jnp inside the models promote


class Law:
    """A case, adapters whose `b` is not zero, and both sides of the law as one program each.

    scheme: the quantisation of the targets' base; the definition merges into the dequantised base.
    """

    def __init__(self, case: cases.Case, kind: str = "lora", scheme: str | None = None) -> None:
        self.case = case
        spec = lora_jax.LoraSpec(RANK, 3.0 * RANK, case.targets, kind=kind)
        self.layout = lora_jax.resolve(spec, case.f, case.params, *case.args, **case.kwargs)
        self.base_params = case.params
        if scheme is not None:
            block = None if scheme == "nf4" else "channel"
            self.base_params = lora_jax.quantize(case.params, scheme, self.layout, block=block)
        start = functools.partial(lora_jax.init, jax.random.key(1), self.layout)
        shapes = jax.eval_shape(lambda params: start(params=params), self.base_params)
        draw = np.random.default_rng(2).standard_normal
        drawn = jax.tree.map(lambda x: (0.3 * draw(x.shape)).astype(x.dtype), shapes)
        self.adapters = jax.device_put(drawn)
        self._adapted = lora_jax.adapt(self.layout, case.f)
        floating = [i for i, x in enumerate(case.args) if jnp.issubdtype(x.dtype, jnp.floating)]
        self.position = floating[0] if floating and case.reverse else None
        self.x = None if self.position is None else case.args[self.position]
        self.derive_fast = jax.jit(self._derive(self.fast))
        self.derive_slow = jax.jit(self._derive(self.slow))

    def fast(self, params: Any, adapters: Any, x: Any = None) -> Any:
        return self._adapted(params, adapters, *self._args(x), **self.case.kwargs)

    def slow(self, params: Any, adapters: Any, x: Any = None) -> Any:
        merged = lora_jax.merge(self.layout, lora_jax.dequantize(params), adapters)
        return self.case.f(merged, *self._args(x), **self.case.kwargs)

    @functools.cached_property
    def base(self) -> Any:
        run = jax.jit(lambda params, *args: self.case.f(params, *args, **self.case.kwargs))
        return run(self.case.params, *self.case.args)

    def _args(self, x: Any) -> tuple[Any, ...]:
        args = list(self.case.args)
        if x is not None:
            args[self.position] = x
        return tuple(args)

    def _derive(self, fn: Any) -> Any:
        """From (params, adapters, x) to outputs, derivative by adapters, gradient of x."""

        def loss(params: Any, adapters: Any, x: Any) -> Any:
            out = fn(params, adapters, x)
            return weighted(out), out

        def reverse(params: Any, adapters: Any, x: Any) -> Any:
            (_, out), gradients = jax.value_and_grad(loss, (1, 2), True)(params, adapters, x)
            return out, *gradients

        def forward(params: Any, adapters: Any, x: Any) -> Any:
            tangent = jax.tree.map(jnp.cos, adapters)
            one = lambda adapters: loss(params, adapters, x)  # noqa: E731
            _, slope, out = jax.jvp(one, (adapters,), (tangent,), has_aux=True)
            return out, slope, None

        return reverse if self.case.reverse else forward

    @functools.cached_property
    def got(self) -> tuple[Any, Any, Any]:
        return self.derive_fast(self.base_params, self.adapters, self.x)

    @functools.cached_property
    def want(self) -> tuple[Any, Any, Any]:
        return self.derive_slow(self.base_params, self.adapters, self.x)


@pytest.fixture(scope="module", params=sorted(cases.REGISTRY))
def law(request: pytest.FixtureRequest) -> Law:
    """The law of a case; module scope lets its tests run together and share its programs."""
    return Law(cases.REGISTRY[request.param]())


def weighted(out: Any) -> Any:
    """Return a sum of every floating output with weights that differ from entry to entry."""
    leaves = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum(
        (x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)).sum() for x in leaves
    )


def scalar(fn: Any) -> Any:
    """Return fn(params, adapters) as a loss."""
    return lambda params, adapters: weighted(fn(params, adapters))


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Compare each array to `tolerance` of its largest entry."""
    chex.assert_trees_all_equal_structs(got, want)
    got, want = jax.device_get((got, want))  # NumPy compiles nothing
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        limit = tolerance * max(float(np.abs(y).max()), 1e-3)
        chex.assert_trees_all_close(x, y, rtol=0, atol=limit)


def test_outputs_equal_those_of_the_merged_weights(law: Law) -> None:
    want = law.want[0]
    assert_close(law.got[0], want)
    outputs = zip(*map(jax.tree.leaves, (law.base, want)), strict=True)
    moved = [not np.allclose(x, y) for x, y in outputs]
    assert any(moved), "the adapters change no output: the case proves nothing"


def test_gradients_equal_those_of_the_merged_weights(law: Law) -> None:
    assert_close(law.got[1], law.want[1])
    assert any(np.any(x) for x in jax.tree.leaves(law.got[1]))


def test_gradients_of_the_inputs_equal_those_of_the_merged_weights(law: Law) -> None:
    if law.x is None:
        pytest.skip("no floating input, or no reverse mode")
    assert_close(law.got[2], law.want[2])


def test_no_product_has_the_shape_of_a_weight(law: Law) -> None:
    """Neither a @ b nor a gradient of W is formed, forward or backward."""
    targets = law.layout.targets
    sizes = {t.fan_in * t.fan_out for t in targets}

    def made(fn: Any) -> set[int]:
        if law.case.reverse:
            fn = jax.grad(scalar(fn), 1)
        return programs.product_sizes(fn, law.case.params, law.adapters)

    stacked = {t.fan_in * t.fan_out * s for t in targets for s in t.sizes(t.stack)}
    assert not made(law.fast) & (sizes | stacked)
    assert made(law.slow) & (sizes | stacked)


@pytest.mark.few(20)
def test_composes_with_outer_transformations(law: Law) -> None:
    """The adapted function works eagerly, in `eval_shape`, and in `vmap` over its adapters."""
    params, adapters = law.case.params, law.adapters
    if law.case.name.startswith("bare_"):
        assert_close(law.fast(params, adapters), law.want[0])
    same_shapes = chex.assert_trees_all_equal_shapes_and_dtypes
    same_shapes(*(jax.eval_shape(fn, params, adapters) for fn in (law.fast, law.slow)))
    if not law.case.batched:
        return
    negative = jax.tree.map(np.negative, adapters)
    many = jax.tree.map(lambda x, y: np.stack([x, y, np.zeros_like(x)]), adapters, negative)
    fast, slow = (jax.vmap(fn, (None, 0)) for fn in (law.fast, law.slow))
    same_shapes(*(jax.eval_shape(fn, params, many) for fn in (fast, slow)))
    each = (law.want[0], law.derive_slow(params, negative, law.x)[0], law.base)
    want = jax.tree.map(lambda *x: np.stack(x), *each)
    assert_close(jax.jit(fast)(params, many), want)


def test_the_first_output_is_the_base(law: Law) -> None:
    fresh = lora_jax.init(jax.random.key(0), law.layout)
    got = law.derive_fast(law.case.params, fresh, law.x)[0]
    assert_close(got, law.base, tolerance=1e-6)


def test_resolve_needs_shapes_only(law: Law) -> None:
    case = law.case
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.params)
    spec = lora_jax.LoraSpec(RANK, 3.0 * RANK, case.targets)
    assert lora_jax.resolve(spec, case.f, shapes, *case.args, **case.kwargs) == law.layout


@pytest.mark.parametrize("name", ["linen_attention", "bare_ragged_dot", "linen_conv_grouped"])
def test_forward_mode_and_second_derivatives(name: str) -> None:
    law = Law(cases.REGISTRY[name]())
    tangent = jax.tree.map(jnp.cos, law.adapters)

    def curvature(fn: Any) -> Any:
        def loss(adapters: Any) -> Any:
            return jnp.tanh(scalar(fn)(law.case.params, adapters) / 50)

        return jax.jit(lambda ad: jax.jvp(jax.grad(loss), (ad,), (tangent,)))(law.adapters)

    assert_close(curvature(law.fast), curvature(law.slow), 1e-4)


@pytest.mark.parametrize("name", ["bare_scan", "bare_fused_reshape", "linen_scan_remat"])
def test_the_same_function_traced_twice_gives_the_same_jaxpr(name: str) -> None:
    law = Law(cases.REGISTRY[name]())
    case = law.case
    first, second = (
        str(jax.make_jaxpr(law.fast)(case.params, law.adapters, law.x)) for _ in range(2)
    )
    assert first == second
