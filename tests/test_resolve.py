"""Spec and layout: the parameters that are chosen, and the specs that are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import LoraError, LoraSpec, Rule, resolve

PARAMS = {
    "body": {"first": jnp.ones((6, 8)), "second": jnp.ones((8, 6)), "bias": jnp.ones((1, 8))},
    "head": jnp.ones((6, 5)),
    "unused": jnp.ones((3, 3)),
}
X = jnp.ones((2, 6))


def mlp(p: Any, x: Any) -> Any:
    h = jnp.tanh(x @ p["body"]["first"] + p["body"]["bias"])
    return (x + h @ p["body"]["second"]) @ p["head"]


def resolved(*targets: Any, rank: int = 2, f: Any = mlp, **kwargs: Any) -> lora_jax.Layout:
    return resolve(LoraSpec(rank, 4.0, targets, **kwargs), f, PARAMS, X)


def paths_of(layout: lora_jax.Layout) -> list[str]:
    return [t.path for t in layout.targets]


def test_all_linear_takes_every_product_but_the_output_head() -> None:
    assert paths_of(resolved("all-linear")) == ["body/first", "body/second"]


def test_a_residual_stream_has_no_output_head() -> None:
    def encoder(p: Any, x: Any) -> Any:
        x = x @ p["head"] @ p["head"].T
        h = x + jnp.tanh(x @ p["body"]["first"]) @ p["body"]["second"]
        return (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True)

    layout = resolve(LoraSpec(2, 4.0), encoder, PARAMS, X)
    assert paths_of(layout) == ["body/first", "body/second", "head"]


def test_the_head_is_found_behind_a_loss_and_inside_calls() -> None:
    def loss(p: Any, x: Any, labels: Any) -> Any:
        logits = jax.checkpoint(jax.jit(mlp))(p, x)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels, axis=-1).mean()

    layout = resolve(LoraSpec(2, 4.0), loss, PARAMS, X, jnp.zeros((2, 1), int))
    assert paths_of(layout) == ["body/first", "body/second"]


def test_the_first_matching_rule_wins() -> None:
    layout = resolved(Rule("**/first", rank=3, alpha=1.5), Rule("body/{first,second}", alpha=8.0))
    first, second = layout.targets
    assert (first.rank, first.scale) == (3, 0.5)
    assert (second.rank, second.scale) == (2, 4.0)


def test_a_rule_that_earlier_ones_hide_is_an_error() -> None:
    """A later rule with other settings must decide at least one parameter."""
    with pytest.raises(LoraError, match=r"'body/first' changes nothing: .*first,second"):
        resolved(Rule("body/{first,second}"), Rule("body/first", rank=3))
    wide = resolved(Rule("body/first"), Rule("body/{first,second}", rank=3))
    assert [target.rank for target in wide.targets] == [2, 3]
    assert paths_of(resolved("body/{first,second}", "body/first")) == ["body/first", "body/second"]


def test_no_targets_is_an_empty_layout() -> None:
    layout = resolved()
    assert layout.targets == ()
    adapters = lora_jax.init(jax.random.key(0), layout)
    assert adapters == {}
    assert (lora_jax.adapt(layout, mlp)(PARAMS, adapters, X) == mlp(PARAMS, X)).all()


def test_a_pattern_that_matches_nothing_names_the_nearest_paths() -> None:
    with pytest.raises(LoraError, match=r"'body/frist' matches no parameter(.|\n)*body/first"):
        resolved("body/frist")
    with pytest.raises(LoraError, match="matches no parameter") as far:
        resolved("body/first", fold=("nowhere",))
    assert "nearest" not in str(far.value)
    with pytest.raises(LoraError) as whole:
        resolved("**/body")  # the bias comes first in the tree
    assert str(whole.value).index("body/first") < str(whole.value).index("body/bias")


def test_a_match_that_no_product_consumes() -> None:
    with pytest.raises(LoraError, match=r"'body/bias'(.|\n)*`add` at .*test_resolve"):
        resolved("body/*")
    with pytest.raises(LoraError, match=r"'unused'(.|\n)*nothing reads it"):
        resolved("unused")


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_ranks_that_are_none(rank: Any) -> None:
    with pytest.raises(LoraError, match="rank must be"):
        LoraSpec(rank=rank)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), "16"])
def test_alphas_that_are_none(alpha: Any) -> None:
    with pytest.raises(LoraError, match="alpha must be"):
        LoraSpec(alpha=alpha)


@pytest.mark.parametrize(
    "f",
    [
        lambda p, x: x + p["head"].T[0][None],
        lambda p, x: x @ (2 * p["head"].T[0]),
        lambda p, x: p["head"].T[0] @ p["body"]["first"],
    ],
)
def test_a_row_that_goes_on_as_a_value_is_a_lookup(f: Any) -> None:
    """A row that is used as a value is looked up, so its weight gets the axes of a lookup."""
    (target,) = resolved("head", f=f).targets
    assert (target.stack, target.inputs, target.outputs) == ((), (1,), (0,))


def test_a_rank_above_the_smaller_side() -> None:
    with pytest.raises(LoraError, match=r"'head': rank 6 is above min\(in, out\) = min\(6, 5\)"):
        resolved("head", rank=6)
    assert resolved("head", rank=5).targets[0].rank == 5


def test_an_operation_without_a_rule_names_itself_and_the_cure() -> None:
    def regularised(p: Any, x: Any) -> Any:
        return mlp(p, x).sum() + (p["body"]["first"] ** 2).sum()

    with pytest.raises(
        LoraError,
        match=r"'body/first'.*`(integer_pow|square|mul)` at .*test_resolve(.|\n)*fold=",
    ):
        resolved("body/first", f=regularised)


def test_a_custom_vjp_is_refused() -> None:
    """With a fold it follows the law: tests/test_left_out.py."""

    @jax.custom_vjp
    def product(w: Any, x: Any) -> Any:
        return x @ w

    product.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, g: (2 * r[1].T @ g, 2 * g @ r[0].T))
    f = lambda p, x: product(p["head"], x)  # noqa: E731
    with pytest.raises(LoraError, match=r"'head'.*`custom_vjp_call` at(.|\n)*fold=\('head',\)"):
        resolved("head", f=f)


def test_two_adapted_weights_in_one_product_are_refused() -> None:
    f = lambda p, x: x @ (p["body"]["first"] @ p["body"]["second"])  # noqa: E731
    one = resolved("body/first", f=f)
    ones = jax.tree.map(jnp.ones_like, lora_jax.init(jax.random.key(0), one))
    want = f(lora_jax.merge(one, PARAMS, ones), X)
    assert jnp.allclose(lora_jax.adapt(one, f)(PARAMS, ones, X), want, rtol=1e-5)
    layout = resolved("body/first", "body/second", f=f)
    adapters = lora_jax.init(jax.random.key(0), layout)
    with pytest.raises(LoraError, match="dot_general"):
        lora_jax.adapt(layout, f)(PARAMS, adapters, X)


def test_returning_an_adapted_weight_is_refused() -> None:
    f = lambda p, x: (x @ p["head"], p["head"])  # noqa: E731
    with pytest.raises(LoraError, match="'head'"):
        resolved("head", f=f)


def test_an_adapter_that_is_never_read() -> None:
    layout = resolved("body/first", "head")
    adapters = lora_jax.init(jax.random.key(0), layout)
    encode = lambda p, x: x @ p["body"]["first"]  # noqa: E731
    with pytest.raises(LoraError, match=r"never reads the adapter of 'head'(.|\n)*subset"):
        lora_jax.adapt(layout, encode)(PARAMS, adapters, X)
    part = layout.subset("body/**")
    g = lora_jax.adapt(part, encode)
    assert g(PARAMS, {"body/first": adapters["body/first"]}, X).shape == (2, 8)


def test_parameters_that_do_not_fit_the_layout() -> None:
    layout = resolved("head")
    adapters = lora_jax.init(jax.random.key(0), layout)
    g = lora_jax.adapt(layout, mlp)
    with pytest.raises(LoraError, match=r"no 'head'(.|\n)*params/head"):
        g({"params": PARAMS}, adapters, X)
    with pytest.raises(LoraError, match=r"'head' has shape \(6, 7\)"):
        lora_jax.merge(layout, {**PARAMS, "head": jnp.ones((6, 7))}, adapters)


def test_a_function_with_its_own_gradient_has_three_cures() -> None:
    """Both errors, of `resolve` and of `adapt`, name them; a folded weight is marked as such."""

    @jax.custom_vjp
    def own(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    own.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}

    def f(params: Any, x: jax.Array) -> jax.Array:
        return own(x, params["w"]) + x @ params["w"] + params["b"][None]

    x = jnp.ones((2, 3))
    rules = ("w", lora_jax.Rule("b", kind="bias"))
    layout = lora_jax.resolve(LoraSpec(2, 2.0, rules, fold="w"), f, params, x)
    rows = {line.split()[0]: line.split()[1:] for line in str(layout).splitlines()}
    assert rows["w"] == ["3x4", "-", "0", "1", "lora", "folded", "2", "1", "14"]
    assert rows["b"] == ["4", "-", "-", "0", "bias", "-", "1", "4"]  # it has no rank
    cures = ("out of the targets", "fold=('w',)", "table.register(rule, function=")
    with pytest.raises(LoraError) as of_resolve:
        lora_jax.resolve(LoraSpec(2, 2.0, rules), f, params, x)
    plain = lora_jax.Layout(tuple(dataclasses.replace(t, fold=False) for t in layout.targets))
    adapters = lora_jax.init(jax.random.key(0), plain)
    with pytest.raises(LoraError) as of_adapt:
        lora_jax.adapt(plain, f)(params, adapters, x)
    for error in (of_resolve, of_adapt):
        assert all(cure in str(error.value) for cure in cures)
