"""Grouping the examples of a mixed batch by adapter changes only the time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.multi import segmented_matmul

EXAMPLES, ROWS, IN, OUT, RANK = 40, 2, 6, 5, 3


def operands(adapters: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(adapters), 5)
    return (
        jax.random.normal(keys[0], (EXAMPLES, ROWS, IN)),
        jax.random.normal(keys[1], (adapters, IN, RANK)),
        jax.random.normal(keys[2], (adapters, RANK, OUT)),
        jax.random.normal(keys[3], (adapters,)),
        jax.random.randint(keys[4], (EXAMPLES,), 0, adapters),
    )


def mixed(x: jax.Array, a: jax.Array, b: jax.Array, gain: jax.Array, ids: jax.Array) -> jax.Array:
    one = lambda x, i: segmented_matmul.product(x, a, b, gain, i, "highest")  # noqa: E731
    return jax.vmap(one)(x, ids)


def looped(x: jax.Array, a: jax.Array, b: jax.Array, gain: jax.Array, ids: jax.Array) -> jax.Array:
    each = [gain[i] * (x[n] @ a[i]) @ b[i] for n, i in enumerate(np.asarray(ids))]
    return jnp.stack(each)


@pytest.mark.few(1)
@pytest.mark.parametrize("adapters", [1, 3, 64])
def test_outputs_and_gradients_equal_a_loop(adapters: int) -> None:
    x, a, b, gain, ids = operands(adapters)

    def loss(call, x, a, b, gain):  # type: ignore[no-untyped-def]
        return jnp.sum(jnp.sin(call(x, a, b, gain, ids)))

    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(
            jax.jit(mixed)(x, a, b, gain, ids), looped(x, a, b, gain, ids), rtol=1e-5, atol=1e-5
        )
        got = jax.jit(jax.grad(lambda *xs: loss(mixed, *xs), argnums=(0, 1, 2, 3)))(x, a, b, gain)
        want = jax.grad(lambda *xs: loss(looped, *xs), argnums=(0, 1, 2, 3))(x, a, b, gain)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_all_examples_with_one_adapter_and_each_with_its_own() -> None:
    x, a, b, gain, _ = operands(EXAMPLES)
    for ids in (jnp.full(EXAMPLES, 7), jnp.arange(EXAMPLES)[::-1]):
        np.testing.assert_allclose(
            mixed(x, a, b, gain, ids), looped(x, a, b, gain, ids), rtol=1e-4, atol=1e-4
        )


def test_one_adapter_that_is_not_finite_spoils_no_other() -> None:
    """Factors that are not finite spoil only the examples of their adapter."""
    x, a, b, gain, ids = operands(3)
    y = mixed(x, a.at[1].set(jnp.nan), b, gain, ids)
    np.testing.assert_array_equal(np.isnan(y).any((1, 2)), np.asarray(ids) == 1)


def test_a_number_that_is_none_gives_nan() -> None:
    x, a, b, gain, ids = operands(3)
    y = mixed(x, a, b, gain, ids.at[4].set(3))
    np.testing.assert_array_equal(np.isnan(y).any((1, 2)), np.arange(EXAMPLES) == 4)


def test_the_factors_are_brought_once_for_each_block() -> None:
    """The factors are copied once for each block of examples."""
    x, a, b, gain, ids = operands(3)
    text = jax.jit(mixed).lower(x, a, b, gain, ids).as_text()
    assert f"tensor<{segmented_matmul.blocks(EXAMPLES, 3)}x{IN}x{RANK}xf32>" in text
    assert f"tensor<{EXAMPLES}x{IN}x{RANK}xf32>" not in text
