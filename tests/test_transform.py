"""The centre of the suite: `adapt == merge`, in outputs and in gradients, over the whole table."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest

import lora_jax
from tests import cases, programs

RANK = 2
pytestmark = pytest.mark.standard_promotion  # Flax and jnp inside the models promote


@pytest.fixture(params=sorted(cases.REGISTRY))
def case(request: pytest.FixtureRequest) -> cases.Case:
    return cases.REGISTRY[request.param]()


def resolved(case: cases.Case, rank: int = RANK) -> tuple[lora_jax.Layout, Any]:
    """The layout, and adapters whose `b` is not zero."""
    spec = lora_jax.LoraSpec(rank, 3.0 * rank, case.targets)
    layout = lora_jax.resolve(spec, case.f, case.params, *case.args, **case.kwargs)
    adapters = lora_jax.init(jax.random.key(1), layout)
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    leaves = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return layout, jax.tree.unflatten(tree, leaves)


def both(case: cases.Case, layout: lora_jax.Layout) -> tuple[Any, Any]:
    """The fast path and the definition, as functions of (params, adapters)."""
    g = lora_jax.adapt(layout, case.f)
    fast = lambda p, ad: g(p, ad, *case.args, **case.kwargs)  # noqa: E731
    slow = lambda p, ad: case.f(lora_jax.merge(layout, p, ad), *case.args, **case.kwargs)  # noqa: E731
    return jax.jit(fast), jax.jit(slow)


def scalar(fn: Any) -> Any:
    """A loss that reads every output, none of them alike."""

    def loss(params: Any, adapters: Any) -> Any:
        leaves = [
            x
            for x in jax.tree.leaves(fn(params, adapters))
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return sum(
            (x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)).sum() for x in leaves
        )

    return loss


def assert_close(got: Any, want: Any, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest entry of each array."""
    chex.assert_trees_all_equal_structs(got, want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        limit = tolerance * max(float(jnp.abs(y).max()), 1e-3)
        chex.assert_trees_all_close(x, y, rtol=0, atol=limit)


def test_outputs_equal_those_of_the_merged_weights(case: cases.Case) -> None:
    """Red if a rule drops the scale, or contracts the wrong axis of a or b."""
    layout, adapters = resolved(case)
    fast, slow = both(case, layout)
    want = slow(case.params, adapters)
    assert_close(fast(case.params, adapters), want)
    base = case.f(case.params, *case.args, **case.kwargs)
    moved = [
        not jnp.allclose(x, y) for x, y in zip(*map(jax.tree.leaves, (base, want)), strict=True)
    ]
    assert any(moved), "the adapters change nothing: this case proves nothing"


def test_gradients_equal_those_of_the_merged_weights(case: cases.Case) -> None:
    """Red if a rule cuts the tape (a stop_gradient on h, a wrong custom rule)."""
    layout, adapters = resolved(case)
    fast, slow = both(case, layout)
    if not case.reverse:
        tangent = jax.tree.map(jnp.cos, adapters)
        got, want = (
            jax.jvp(lambda ad, fn=fn: scalar(fn)(case.params, ad), (adapters,), (tangent,))
            for fn in (fast, slow)
        )
    else:
        got, want = (jax.jit(jax.grad(scalar(fn), 1))(case.params, adapters) for fn in (fast, slow))
    assert_close(got, want)
    assert any(jnp.any(x != 0) for x in jax.tree.leaves(got))


def test_gradients_of_the_inputs_equal_those_of_the_merged_weights(case: cases.Case) -> None:
    """Red if the low-rank product hands no (or a wrong) cotangent to x."""
    floating = [i for i, x in enumerate(case.args) if jnp.issubdtype(x.dtype, jnp.floating)]
    if not floating or not case.reverse:
        pytest.skip("no floating input, or no reverse mode")
    layout, adapters = resolved(case)
    i = floating[0]

    def of_input(fn: Any) -> Any:
        def loss(x: Any) -> Any:
            args = (*case.args[:i], x, *case.args[i + 1 :])
            return scalar(lambda p, ad: fn(p, ad, args))(case.params, adapters)

        return jax.jit(jax.grad(loss))(case.args[i])

    g = lora_jax.adapt(layout, case.f)
    got = of_input(lambda p, ad, args: g(p, ad, *args, **case.kwargs))
    want = of_input(lambda p, ad, args: case.f(lora_jax.merge(layout, p, ad), *args, **case.kwargs))
    assert_close(got, want)


def test_no_product_has_the_shape_of_a_weight(case: cases.Case) -> None:
    """Neither a @ b nor a gradient of W, forward or backward. Red if a rule folds its weight.

    The same count on the merged weights finds both, so the test can see them.
    """
    layout, adapters = resolved(case)
    sizes = {t.fan_in * t.fan_out for t in layout.targets}
    fast, slow = both(case, layout)

    def made(fn: Any) -> set[int]:
        if not case.reverse:
            return programs.product_sizes(fn, case.params, adapters)
        return programs.product_sizes(jax.grad(scalar(fn), 1), case.params, adapters)

    stacked = {t.fan_in * t.fan_out * s for t in layout.targets for s in t.sizes(t.stack)}
    assert not made(fast) & (sizes | stacked)
    assert made(slow) & (sizes | stacked)


def test_composes_with_outer_transformations(case: cases.Case) -> None:
    """Eager, `eval_shape`, `vmap` over adapters of one base. Red if a rule needs values."""
    layout, adapters = resolved(case)
    fast, slow = both(case, layout)
    eager = lora_jax.adapt(layout, case.f)(case.params, adapters, *case.args, **case.kwargs)
    assert_close(eager, slow(case.params, adapters))
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(fast, case.params, adapters), jax.eval_shape(slow, case.params, adapters)
    )
    if not case.batched:
        return
    many = jax.tree.map(lambda x: jnp.stack([x, -x, 0 * x]), adapters)
    in_axes = (None, 0)
    assert_close(
        jax.jit(jax.vmap(fast, in_axes))(case.params, many),
        jax.jit(jax.vmap(slow, in_axes))(case.params, many),
    )


def test_the_first_output_is_the_base(case: cases.Case) -> None:
    """With b = 0. Red if b starts elsewhere, or the base product is computed otherwise."""
    spec = lora_jax.LoraSpec(RANK, 1.0, case.targets)
    layout = lora_jax.resolve(spec, case.f, case.params, *case.args, **case.kwargs)
    g = lora_jax.adapt(layout, case.f)
    fresh = lora_jax.init(jax.random.key(0), layout)
    assert_close(
        g(case.params, fresh, *case.args, **case.kwargs),
        case.f(case.params, *case.args, **case.kwargs),
        tolerance=1e-6,
    )


def test_resolve_needs_shapes_only(case: cases.Case) -> None:
    """Red if resolve touches a value of a parameter."""
    layout, _ = resolved(case)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), case.params)
    spec = lora_jax.LoraSpec(RANK, 3.0 * RANK, case.targets)
    assert lora_jax.resolve(spec, case.f, shapes, *case.args, **case.kwargs) == layout


@pytest.mark.parametrize("name", ["linen_attention", "bare_ragged_dot", "linen_conv_grouped"])
def test_forward_mode_and_second_derivatives(name: str) -> None:
    """Red if the fast path is a custom VJP: JAX then has no forward mode, so no curvature."""
    case = cases.REGISTRY[name]()
    layout, adapters = resolved(case)
    fast, slow = both(case, layout)
    tangent = jax.tree.map(jnp.cos, adapters)

    def curvature(fn: Any) -> Any:
        gradient = jax.grad(lambda ad: jnp.tanh(scalar(fn)(case.params, ad) / 50))
        return jax.jvp(gradient, (adapters,), (tangent,))

    assert_close(
        jax.jit(curvature, static_argnums=0)(fast), jax.jit(curvature, static_argnums=0)(slow), 1e-4
    )
