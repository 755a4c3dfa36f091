"""Every kind against its formula in float64, slice by slice; and invalid input."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Factors, Layout, LoraError, Target
from lora_jax.adapters import gaussian
from lora_jax.updates import kind_of, vera
from tests.programs import compiled
from tests.updates import forms
from tests.updates.forms import arrays, in_order, name_of, slices, weight

noise = jax.jit(vera.noise, static_argnums=(0, 1, 2))
frozen_pair = jax.jit(vera.frozen_pair, static_argnums=(0, 1))
ALL = [*forms.TARGETS, *forms.PARTS]


def definition(target: Target, parameters: Any) -> np.ndarray:
    """The update in float64 and W's order, computed for one slice of the stack at a time."""
    i, o = len(target.inputs), len(target.outputs)
    stack, inputs = target.sizes(target.stack), target.sizes(target.inputs)
    outputs = target.sizes(target.outputs)
    n = int(np.prod(stack, dtype=int))
    found = np.zeros((n, target.fan_in, target.fan_out))
    if target.parts:
        return _definition_of_parts(target, parameters)
    if target.kind in ("lora", "dora"):
        a, b = slices(target, parameters.a, i, 1), slices(target, parameters.b, 1, o)
        found = target.alpha / target.rank * a @ b
    if target.kind == "vera":
        a, b = (np.asarray(x, np.float64) for x in frozen_pair(target, jnp.float32))
        d, e = slices(target, parameters.lambda_d, 1, 0), slices(target, parameters.lambda_b, o, 0)
        for s in range(n):
            found[s] = a @ np.diag(d[s, :, 0]) @ b @ np.diag(e[s, :, 0])
    if target.kind == "loha":
        a1, a2 = slices(target, parameters.a1, i, 1), slices(target, parameters.a2, i, 1)
        b1, b2 = slices(target, parameters.b1, 1, o), slices(target, parameters.b2, 1, o)
        found = target.alpha / target.rank * (a1 @ b1) * (a2 @ b2)
    if target.kind == "lokr":
        left, a, b = (slices(target, x, 1, 1) for x in parameters)
        for s in range(n):
            found[s] = target.alpha / target.rank * np.kron(left[s], a[s] @ b[s])
    if target.kind == "miss":
        block = slices(target, parameters.block, 1, o)
        found = block[:, np.arange(target.fan_in) % target.rank]
    return in_order(target, found.reshape(*stack, *inputs, *outputs))


def _definition_of_parts(target: Target, parameters: Factors) -> np.ndarray:
    """Each part is LoRA on a weight that consists of the part alone."""
    n_stack, axis = len(target.stack), target.outputs[target.part_axis]
    b_axis = n_stack + 1 + target.outputs.index(axis)
    whole, end = np.zeros(target.shape), 0
    for p, (start, size) in enumerate(target.parts):
        shape = tuple(size if i == axis else x for i, x in enumerate(target.shape))
        own = dataclasses.replace(target, shape=shape, parts=())
        b = np.take(np.asarray(parameters.b), range(end, end + size), axis=b_axis)
        where = [slice(None)] * len(shape)
        where[axis] = slice(start, start + size)
        whole[tuple(where)] = definition(own, Factors(parameters.a[..., p, :], b))
        end += size
    return whole


def close(got: Any, want: np.ndarray, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("target", [t for t in ALL if t.kind in forms.ADDITIVE], ids=name_of)
def test_factors_and_merge_are_the_formula(target: Target) -> None:
    kind, parameters, w = kind_of(target), arrays(target), weight(target)
    want = definition(target, parameters)

    def made(parameters: Any, w: Any) -> Any:
        delta, merged = kind.delta(target, parameters), kind.merged(target, parameters, w)
        return kind.factors(target, parameters), delta, merged

    factors, delta, merged = compiled(made, parameters, w)
    rank = factors.a.shape[-1]
    assert factors.a.shape == (*target.a_shape[:-1], rank)
    n = len(target.stack)
    assert factors.b.shape == (*target.b_shape[:n], rank, *target.b_shape[n + 1 :])
    close(delta, want)
    close(merged, np.asarray(w, np.float64) + want)
    assert not kind.rescales


@pytest.mark.parametrize("target", [t for t in ALL if t.kind == "lokr"], ids=name_of)
def test_the_rank_of_the_factors_of_lokr_is_the_smaller_of_the_two(target: Target) -> None:
    parameters = arrays(target)
    factors = jax.eval_shape(lambda p: kind_of(target).factors(target, p), parameters)
    assert factors.a.shape[-1] == min(parameters.left.shape[-2:]) * target.rank


@pytest.mark.few(12)
@pytest.mark.parametrize("target", ALL, ids=name_of)
def test_it_begins_as_the_base(target: Target) -> None:
    kind, w = kind_of(target), weight(target)

    def begin(key: Any, w: Any) -> Any:
        parameters = kind.init(key, target, jnp.float32, gaussian, w)
        loss = lambda p: ((merged := kind.merged(target, p, w)).sum(), merged)  # noqa: E731
        return parameters, *jax.grad(loss, has_aux=True)(parameters)

    parameters, grads, merged = compiled(begin, jax.random.key(0), w)
    kind.check_parameters(target, parameters)
    assert {x.dtype for x in parameters} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(merged, w, rtol=1e-6)
    assert any(np.any(g) for g in grads), "no array has a gradient: it would stay at the base"


@pytest.mark.parametrize("target", ALL, ids=name_of)
def test_axes_say_where_the_sizes_come_from(target: Target) -> None:
    kind = kind_of(target)
    for axes, shape in zip(kind.axes(target), kind.shapes(target), strict=True):
        assert len(axes) == len(shape)
        known = [(i, n) for i, n in zip(axes, shape, strict=True) if i is not None]
        assert all(target.shape[i] == n for i, n in known)
        assert len({i for i, _ in known}) == len(known)


@pytest.mark.parametrize("kind", forms.KINDS)
def test_a_stack_is_its_slices(kind: str) -> None:
    whole = Target("w", (3, 8, 10), (0,), (1,), (2,), 2, 3.0, kind=kind)
    one = Target("w", (8, 10), (), (0,), (1,), 2, 3.0, kind=kind)
    parameters, w = jax.device_get((arrays(whole), weight(whole)))
    got = compiled(lambda p, w: kind_of(whole).merged(whole, p, w), parameters, w)
    merged = jax.jit(lambda p, w: kind_of(one).merged(one, p, w))
    for i in range(3):
        own = jax.tree.map(lambda x, i=i: x[i], parameters)
        np.testing.assert_allclose(np.asarray(got)[i], merged(own, w[i]), rtol=1e-5, atol=1e-6)


def test_vera_numbers_never_change() -> None:
    # These were computed by the same formula with Python's integers.
    want = [[0.3300279378890991, -0.11746907234191895], [-0.13247203826904297, 0.6441757678985596]]
    np.testing.assert_array_equal(noise(1, 2, 2), np.array(want, np.float32))
    long = np.asarray(noise(2, 400, 300), np.float64)
    assert abs(long.mean()) < 0.01 and abs(long.var() - 1 / 3) < 0.01
    assert np.abs(np.corrcoef(long.T) - np.eye(300)).max() < 0.3
    np.testing.assert_array_equal(long[:5, :4], noise(2, 5, 4))


def test_vera_shares_one_pair() -> None:
    small = Target("small", (4, 3), (), (0,), (1,), 2, 1.0, kind="vera")
    large = Target("large", (6, 5), (), (0,), (1,), 2, 1.0, kind="vera")
    a, b = frozen_pair(small, jnp.float32)
    other_a, other_b = frozen_pair(large, jnp.float32)
    np.testing.assert_allclose(a * 2, other_a[:4] * 6**0.5, rtol=1e-6)
    np.testing.assert_array_equal(b, other_b[:, :3])


def test_scales() -> None:
    target = Target("w", (64, 64), (), (0,), (1,), rank=16, alpha=8.0)
    assert target.scale == 0.5
    assert dataclasses.replace(target, scaling="alpha/sqrt(r)").scale == 2.0
    assert kind_of(forms.as_kind(target, "vera")).scale(target) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dorra"}, r"(?s)'w' has the kind of update 'dorra'.*dora.*vera.*register"),
        ({"rank": 9}, r"'w': rank 9 is above min\(in, out\) = min\(9, 8\) = 8"),
        ({"rank": 9, "kind": "dora"}, r"rank 9 is above min\(in, out\)"),
        ({"rank": 4, "kind": "lokr"}, r"rank 4 is above the smaller of .* 3 and 4 = 3; .*rank=3"),
        ({"rank": 3, "parts": ((0, 2), (4, 4))}, r"rank 3 is above min\(in, part\) = 2"),
        ({"kind": "dora", "parts": ((0, 4),)}, "'w': the kind 'dora' has no parts"),
        ({"parts": ((0, 4), (2, 4))}, "in order and without overlap"),
        ({"parts": ((4, 5),)}, "whose size is 8"),
        ({"parts": ((0, 4),), "part_axis": 1}, "part_axis 1 is not an index"),
        ({"scaling": "alpha"}, r"scaling must be one of .*got 'alpha'"),
    ],
)
def test_targets_that_a_kind_cannot_have(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        Layout((Target(**{**TARGET, **change}),))


TARGET: dict[str, Any] = {
    "path": "w", "shape": (9, 8), "stack": (), "inputs": (0,), "outputs": (1,),
    "rank": 2, "alpha": 2.0,
}  # fmt: skip


def test_vera_may_have_any_rank() -> None:
    target = Target(**{**TARGET, "rank": 256, "kind": "vera"})
    assert Layout((target,))["w"].rank == 256


def test_arrays_of_another_kind_or_shape_are_named() -> None:
    target = Target(**{**TARGET, "kind": "dora"})
    layout, w = Layout((target,)), {"w": jnp.ones((9, 8))}
    with pytest.raises(LoraError, match=r"expected Directed\(a, b, magnitude\), got Factors"):
        lora_jax.merge(layout, w, {"w": Factors(jnp.ones((9, 2)), jnp.ones((2, 8)))})
    bad = arrays(target)._replace(magnitude=jnp.ones(9))
    with pytest.raises(LoraError, match=r"magnitude: got \(9,\), the layout has \(8,\)"):
        lora_jax.merge(layout, w, {"w": bad})


def test_dora_asks_for_the_parameters() -> None:
    layout = Layout((Target(**{**TARGET, "kind": "dora"}),))
    with pytest.raises(LoraError, match=r"init\(key, layout, params=params\)"):
        lora_jax.init(jax.random.key(0), layout)
    w = jnp.ones((9, 8))
    adapters = lora_jax.init(jax.random.key(0), layout, params={"w": w})
    np.testing.assert_allclose(adapters["w"].magnitude, 3.0, rtol=1e-6)
    with pytest.raises(LoraError, match="the layout does not fit the parameters"):
        lora_jax.init(jax.random.key(0), layout, params={"w": w.T})


def test_a_bias() -> None:
    target = Target("bias", (3, 4), (0,), (), (1,), rank=1, alpha=1.0, kind="bias")
    layout, params = Layout((target,)), {"bias": jnp.ones((3, 4), jnp.bfloat16)}
    adapters = lora_jax.init(jax.random.key(0), layout)
    assert lora_jax.count(adapters) == layout.size == 12
    moved = jax.tree.map(lambda x: x + 0.5, adapters)
    merged = lora_jax.merge(layout, params, moved)["bias"]
    assert merged.dtype == jnp.bfloat16 and (merged == 1.5).all()
    assert kind_of(target).factors(target, moved["bias"]) is None
