"""The layout names the parameters that `"all-linear"` leaves out, with a reason and a cure.

Each program computes the weight side of a product in another way. The product is the last of the
program or the one before it. A kernel that is left out still counts, so the layer before it does
not become the output head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl

import lora_jax
from lora_jax import LoraError, LoraSpec, Rule
from tests import laws
from tests.cases import normal

X = normal(1, 3, 6)
ORDER = jnp.array([3, 0, 7, 2, 1, 6, 5, 4])
SQUARE = {"w": normal(2, 8, 8)}
TWO = {"w": normal(2, 8, 8), "v": normal(3, 8, 8)}
HALVES = {"w": normal(2, 8, 4), "v": normal(3, 8, 4)}

Product = Callable[[Any, Any], Any]
REGISTRY: dict[str, tuple[Product, dict[str, Any]]] = {}


def case(params: dict[str, Any]) -> Callable[[Product], Product]:
    """Register a function of h [3, 8] and `params` whose result is [3, 8]."""

    def register(product: Product) -> Product:
        REGISTRY[product.__name__] = product, params
        return product

    return register


@case(HALVES)
def concatenated(h: Any, p: Any) -> Any:
    return h @ jnp.concatenate([p["w"], p["v"]], axis=1)


@case(HALVES)
def stacked(h: Any, p: Any) -> Any:
    return jnp.einsum("bi,iko->bko", h, jnp.stack([p["w"], p["v"]], axis=1)).reshape(3, 8)


@case({"w": normal(2, 8, 6)})
def padded(h: Any, p: Any) -> Any:
    return h @ jnp.pad(p["w"], ((0, 0), (1, 1)))


@case({"w": normal(2, 8, 4)})
def tiled(h: Any, p: Any) -> Any:
    return h @ jnp.tile(p["w"], (1, 2))


@case(SQUARE)
def normalised(h: Any, p: Any) -> Any:
    return h @ (p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True))


@case({**SQUARE, "g": normal(3, 8)})
def gained(h: Any, p: Any) -> Any:
    return h @ (p["w"] * p["g"][None])


@case(TWO)
def summed(h: Any, p: Any) -> Any:
    return h @ (p["w"] + p["v"])


@case(SQUARE)
def symmetric(h: Any, p: Any) -> Any:
    return h @ (p["w"] + p["w"].T)


@case(TWO)
def multiplied(h: Any, p: Any) -> Any:
    return h @ (p["w"] @ p["v"])


@case(SQUARE)
def exponential(h: Any, p: Any) -> Any:
    return h @ jnp.exp(0.1 * p["w"])


@case(SQUARE)
def masked(h: Any, p: Any) -> Any:
    return h @ jnp.where(jnp.tri(8) > 0, p["w"], 0.0)


@case(TWO)
def chosen_by_a_condition(h: Any, p: Any) -> Any:
    return h @ lax.cond(h.sum() > -99, lambda: p["w"], lambda: p["v"])


@case(TWO)
def chosen_by_a_select(h: Any, p: Any) -> Any:
    return h @ jnp.where(h.sum() > -99, p["w"], p["v"])


@case(SQUARE)
def column_by_column(h: Any, p: Any) -> Any:
    return lax.map(lambda column: h @ column, p["w"].T).T


@case(SQUARE)
def column_by_column_and_stacked(h: Any, p: Any) -> Any:
    return jnp.stack([h @ p["w"][:, i] for i in range(8)], axis=1)


@case(SQUARE)
def columns_gathered(h: Any, p: Any) -> Any:
    return h @ p["w"][:, ORDER]


@case(SQUARE)
def rows_gathered(h: Any, p: Any) -> Any:
    return h @ p["w"][ORDER]


@case(SQUARE)
def entries_gathered(h: Any, p: Any) -> Any:
    return h @ p["w"].reshape(-1)[(8 * ORDER[:, None] + ORDER[None])]


@case(SQUARE)
def carried_and_changed(h: Any, p: Any) -> Any:
    def step(carry: Any, _: Any) -> Any:
        h, w = carry
        return (jnp.tanh(h @ w), 0.5 * w), None

    return lax.scan(step, (h, p["w"]), None, length=2)[0][0]


@case(SQUARE)
def carried_and_rolled(h: Any, p: Any) -> Any:
    step = lambda w, _: (jnp.roll(w, 1, axis=0), None)  # noqa: E731
    return h @ lax.scan(step, p["w"], None, length=2)[0]


@case({"w": normal(2, 2, 8, 8)})
def a_layer_of_a_while_loop(h: Any, p: Any) -> Any:
    def step(i: Any, h: Any) -> Any:
        return jnp.tanh(h @ lax.dynamic_index_in_dim(p["w"], i, keepdims=False))

    return lax.fori_loop(0, 2, step, h)


@case(SQUARE)
def in_a_pallas_kernel(h: Any, p: Any) -> Any:
    def kernel(h: Any, w: Any, out: Any) -> None:
        out[...] = h[...] @ w[...]

    shape = jax.ShapeDtypeStruct((3, 8), jnp.float32)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(h, p["w"])


@jax.custom_vjp
def _doubled(h: Any, w: Any) -> Any:
    return h @ w


_doubled.defvjp(lambda h, w: (h @ w, (h, w)), lambda r, g: (2 * g @ r[1].T, 2 * r[0].T @ g))


@case(SQUARE)
def in_a_custom_vjp(h: Any, p: Any) -> Any:
    return _doubled(h, p["w"])


@case(SQUARE)
def met_by_an_argument_of_a_scan(h: Any, p: Any) -> Any:
    step = lambda w, t: (w, h @ (w + t))  # noqa: E731
    return lax.scan(step, p["w"], h.sum(1))[1].sum(0)


@case(SQUARE)
def scaled_by_an_activation(h: Any, p: Any) -> Any:
    return h @ (p["w"] * h.mean())


@case(SQUARE)
def modulated_for_each_example(h: Any, p: Any) -> Any:
    return jnp.einsum("bi,bio->bo", h, p["w"][None] * h[:, :, None])


@case(SQUARE)
def fast_weights_for_each_example(h: Any, p: Any) -> Any:
    return jnp.einsum("bi,bio->bo", h, p["w"][None] + h[:, :, None] * h[:, None])


@case(TWO)
def behind_a_barrier_over_the_whole_tree(h: Any, p: Any) -> Any:
    p, h = lax.optimization_barrier((p, h))
    return h @ p["w"] + h @ p["v"]


@case(SQUARE)
def put_on_a_device_with_its_operand(h: Any, p: Any) -> Any:
    w, h = jax.device_put((p["w"], h))
    return h @ jax.device_put(w, jax.memory.Space.Device)


def program(name: str, last: bool) -> tuple[Callable[..., Any], dict[str, Any]]:
    product, params = REGISTRY[name]
    params = {**params, "first": normal(4, 6, 8), "head": normal(5, 8, 5)}

    def f(p: Any, x: Any) -> Any:
        h = product(jnp.tanh(x @ p["first"]), p)
        return h if last else jnp.tanh(h) @ p["head"]

    return f, params


NO_REVERSE = {"in_a_pallas_kernel"}


@pytest.mark.parametrize("last", [False, True], ids=["then_a_head", "last"])
@pytest.mark.parametrize("name", list(REGISTRY))
def test_a_kernel_is_a_target_or_named(name: str, last: bool) -> None:
    f, params = program(name, last)
    layout = lora_jax.resolve(LoraSpec(2, 4.0), f, params, X)
    paths = {t.path for t in layout.targets}
    assert "first" in paths, "the layer before a lost kernel became the head"
    laws.assert_complete(layout, f, params, X)
    for path, reason in laws.left_out(layout).items():
        head = path == "head" or last
        assert head or "fold" in reason or "Rule" in reason, f"{path}: no cure in {reason!r}"
    if name not in NO_REVERSE:
        laws.assert_adapt_equals_merge(layout, f, params, X)


@pytest.mark.few(12)
@pytest.mark.parametrize("name", sorted({*REGISTRY} - NO_REVERSE))
def test_a_named_kernel_can_be_adapted_by_the_cure(name: str) -> None:
    f, params = program(name, last=False)
    stack = tuple(range(params["w"].ndim - 2))
    rule = Rule("w", stack=stack, inputs=(len(stack),), outputs=(len(stack) + 1,))
    layout = lora_jax.resolve(LoraSpec(2, 4.0, (rule,), fold="w"), f, params, X)
    (target,) = layout.targets
    assert (target.inputs, target.outputs) == ((len(stack),), (len(stack) + 1,))
    laws.assert_adapt_equals_merge(layout, f, params, X, tolerance=5e-5)


PASSES = ("scaled_by_an_activation", "put_on_a_device_with_its_operand")


@pytest.mark.parametrize("name", [*PASSES, "behind_a_barrier_over_the_whole_tree"])
def test_a_weight_that_passes_is_a_target(name: str) -> None:
    """Scales, barriers and transfers pass a weight on; a barrier does not hide the output head."""
    f, params = program(name, last=False)
    layout = lora_jax.resolve(LoraSpec(2, 4.0), f, params, X)
    assert {t.path for t in layout.targets} == {*params} - {"head"}


def members(p: Any, x: Any) -> Any:
    """Four models that see one x."""
    one = lambda p, x: jax.nn.gelu(x @ p["a"] + p["b"][None]) @ p["c"]  # noqa: E731
    return jnp.tanh(jax.vmap(one, in_axes=(0, None))(p, x)).mean(0) @ p["d"][0]


@pytest.mark.standard_promotion
def test_the_members_of_an_ensemble_have_adapters_of_their_own() -> None:
    """The member axis is a stack axis in the first layer too, where all members see one x."""
    params = {"a": normal(2, 4, 6, 8), "b": normal(3, 4, 8), "c": normal(4, 4, 8, 7)}
    params["d"] = normal(5, 4, 7, 2)
    layout = lora_jax.resolve(LoraSpec(2, 4.0), members, params, X)
    assert {t.path: t.stack for t in layout.targets} == {"a": (0,), "c": (0,)}
    laws.assert_adapt_equals_merge(layout, members, params, X)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_output_axis_may_be_stated_as_a_stack_axis(kind: str) -> None:
    """If the trace cannot tell, the layout says what it chose, and a rule may say otherwise."""

    def f(p: Any, x: Any) -> Any:
        kv = jnp.einsum("bd,ckdh->cbkh", x, p["kv"])
        return (kv[0] * kv[1]).reshape(3, 8) @ p["head"]

    params = {"kv": normal(2, 2, 2, 6, 4), "head": normal(3, 8, 5)}
    layout = lora_jax.resolve(LoraSpec(2, 4.0), f, params, X)
    assert (layout["kv"].stack, layout["kv"].outputs) == ((), (0, 1, 3))
    (remark,) = layout.chosen
    assert "Rule('kv', stack=" in remark.reason and remark.reason.split()[0] in str(layout)
    assert lora_jax.Layout.from_json(layout.to_json()).chosen == layout.chosen
    rule = Rule("kv", stack=(0,), inputs=(2,), outputs=(1, 3))
    layout = lora_jax.resolve(LoraSpec(1, 4.0, rule, kind=kind), f, params, X)
    assert layout["kv"].stack == (0,) and not layout.chosen
    adapters = lora_jax.init(jax.random.key(0), layout, params=params)
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    got = lora_jax.adapt(layout, f)(params, adapters, X)
    want = f(lora_jax.merge(layout, params, adapters), X)
    assert jnp.allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_cure_names_both_steps_at_once() -> None:
    f, params = program("summed", last=False)
    with pytest.raises(LoraError, match=r"Rule\('w'(.|\n)*fold='w'"):
        lora_jax.resolve(LoraSpec(2, 4.0, "w"), f, params, X)
    with pytest.raises(LoraError, match=r"'w'(.|\n)*fold="):
        lora_jax.resolve(LoraSpec(2, 4.0, Rule("w", inputs=0, outputs=1)), f, params, X)


def test_a_kernel_inside_pallas_is_folded() -> None:
    """`fold` adapts a kernel inside Pallas, as the README says; only its outputs are compared."""
    f, params = program("in_a_pallas_kernel", last=False)
    rule = Rule("w", inputs=(0,), outputs=(1,))
    layout = lora_jax.resolve(LoraSpec(2, 4.0, (rule,), fold="w"), f, params, X)
    adapters = laws.drawn_adapters(layout)
    got = lora_jax.adapt(layout, f)(params, adapters, X)
    want = f(lora_jax.merge(layout, params, adapters), X)
    assert jnp.allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "axes",
    [
        {"inputs": (0,), "outputs": (0,)},
        {"inputs": (0,), "outputs": (2,)},
        {"inputs": (0,)},
        {"inputs": (), "outputs": (0, 1)},
    ],
)
def test_axes_that_do_not_fit_the_parameter(axes: Any) -> None:
    f, params = program("normalised", last=False)
    with pytest.raises(LoraError, match="'w'"):
        lora_jax.resolve(LoraSpec(2, 4.0, (Rule("w", **axes),), fold="w"), f, params, X)


def test_axes_of_a_rule_that_contradict_the_trace() -> None:
    f, params = program("masked", last=False)
    rule = Rule("first", inputs=(1,), outputs=(0,))
    with pytest.raises(LoraError, match=r"'first'(.|\n)*inputs"):
        lora_jax.resolve(LoraSpec(2, 4.0, (rule,)), f, params, X)


def test_what_is_left_out_is_printed_and_saved() -> None:
    f, params = program("normalised", last=False)
    layout = lora_jax.resolve(LoraSpec(2, 4.0), f, params, X)
    again = lora_jax.Layout.from_json(layout.to_json())
    assert again == layout
    assert laws.left_out(again) == laws.left_out(layout)
    assert set(laws.left_out(layout)) == {"w", "head"}
    below = str(layout).split("total", 1)[1]
    assert all(f"{path}" in below for path in laws.left_out(layout))


def test_explicit_targets_leave_nothing_out() -> None:
    f, params = program("normalised", last=False)
    layout = lora_jax.resolve(LoraSpec(2, 4.0, "first"), f, params, X)
    assert not layout.left_out


def test_embeddings_are_named() -> None:
    f = lambda p, ids: jnp.tanh(p["table"][ids] @ p["w"]) @ p["head"]  # noqa: E731
    params = {"table": normal(0, 9, 6), "w": normal(1, 6, 8), "head": normal(2, 8, 5)}
    layout = lora_jax.resolve(LoraSpec(2, 4.0), f, params, jnp.array([1, 4, 8]))
    assert [t.path for t in layout.targets] == ["w"]
    assert set(laws.left_out(layout)) == {"table", "head"}
    assert "embedding" in laws.left_out(layout)["table"]


def test_a_slice_of_a_matrix_that_scales_another_weight() -> None:
    """A matrix of which a slice scales another weight is named: its update cannot be a factor."""
    f = lambda p, x: jnp.tanh(jnp.tanh(x @ (p["w"] * p["v"][:1])) @ p["v"]) @ p["head"]  # noqa: E731
    params = {name: normal(i, 8, 8) for i, name in enumerate(("w", "v", "head"))}
    layout = lora_jax.resolve(LoraSpec(2, 4.0), f, params, normal(4, 3, 8))
    assert "`mul`" in laws.left_out(layout)["v"]
    laws.assert_adapt_equals_merge(layout, f, params, normal(4, 3, 8))
