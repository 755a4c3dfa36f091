"""Mixtures of adapters, against `select`, `combine` and a sum over experts written by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Factors, Layout, LoraSpec
from lora_jax.gate import Load
from tests import cases, programs
from tests.test_transform import assert_close, scalar

pytestmark = pytest.mark.standard_promotion

# One program of each kind of rule that a weight can meet.
PROGRAMS = [
    "bare_custom_jvp",
    "bare_einsum_scrambled",
    "bare_experts_by_index",
    "bare_ragged_dot",
    "linen_conv_grouped",
    "linen_embed_tied",
    "bare_scan",
    "bare_checkpoint_dots",
    "nnx_attention",
    "shard_map_over_scanned_layers",
]
# By token there is no product with W.T (embed_tied), no custom_jvp, no sharded contraction.
REFUSED = ["bare_custom_jvp", "linen_embed_tied", "shard_map_over_scanned_layers"]
BY_TOKEN = [name for name in PROGRAMS if name not in REFUSED]
BY_TOKEN += ["linen_embed", "bare_while", "bare_cond", "nnx_scan"]


def members_of(case: Any, ranks: tuple[int, ...] = (1, 2, 2)) -> list[Any]:
    """Adapters of different ranks and alphas for a program, none of them zero."""
    members = []
    for i, rank in enumerate(ranks):
        spec = LoraSpec(rank, 1.0 + i, case.targets)
        layout = lora_jax.resolve(spec, case.f, case.params, *case.args, **case.kwargs)
        factors = {
            t.path: Factors(_wave(t.a_shape, i), _wave(t.b_shape, i + 0.5)) for t in layout.targets
        }
        members.append((layout, factors))
    return members


def _wave(shape: tuple[int, ...], phase: float) -> Any:
    return jnp.asarray(np.cos(np.arange(np.prod(shape)) ** 1.1 + phase).reshape(shape) / 3)


def runs(case: Any, layout: Layout) -> Any:
    g = lora_jax.adapt(layout, case.f)
    return lambda p, ad: g(p, ad, *case.args, **case.kwargs)


def by_hand(x: Any, w: Any, factors: Factors, scales: Any, gates: Any) -> Any:
    """`x W + sum_i g_i scale_i (x a_i) b_i`, expert by expert."""
    terms = [gates[..., i, None] * s * (x @ factors.a[i] @ factors.b[i]) for i, s in scales]
    return x @ w + sum(terms)


# --- given weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_one_hot_weights_are_select(name: str) -> None:
    """In outputs and gradients. Red if the scales or the order of the experts are mixed up."""
    case = cases.REGISTRY[name]()
    layout, stacked = lora_jax.stack(members_of(case))
    loss = scalar(runs(case, layout))

    @jax.jit
    def values(stacked: Any, one_hot: Any) -> Any:
        mixed = lambda s: loss(case.params, lora_jax.mix(s, one_hot))  # noqa: E731
        chosen = lambda s: loss(case.params, lora_jax.select(s, jnp.argmax(one_hot)))  # noqa: E731
        pairs = [jax.value_and_grad(fn)(stacked) for fn in (mixed, chosen)]
        return [(value, gradient.factors) for value, gradient in pairs]

    got, want = values(stacked, jnp.array([0.0, 1.0, 0.0]))
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_fixed_weights_are_the_combination(name: str) -> None:
    """A law with `combine` and `merge`. Red if a weight multiplies a as well as b."""
    case = cases.REGISTRY[name]()
    members, weights = members_of(case), [0.5, -1.5, 0.25]
    layout, stacked = lora_jax.stack(members)
    combined, adapters = lora_jax.combine(members, weights)
    merged = lora_jax.merge(combined, case.params, adapters)
    got = jax.jit(runs(case, layout))(case.params, lora_jax.mix(stacked, weights))
    assert_close(got, jax.jit(lambda p: case.f(p, *case.args, **case.kwargs))(merged), 2e-5)


def test_weights_per_example() -> None:
    """Each row has its own blend; a row of zeros is the base. Gradients reach the weights."""
    case = cases.REGISTRY["linen_attention"]()
    layout, stacked = lora_jax.stack(members_of(case))
    weights = jnp.array([[0.2, 0.8, 0.0], [0.0, 0.0, 0.0], [1.0, -1.0, 2.0]])
    g = lora_jax.adapt(layout, case.f)
    (x,) = case.args

    def together(weights: Any) -> Any:
        return g(case.params, lora_jax.mix(stacked, weights), x)

    def one_by_one(weights: Any) -> Any:
        rows = [
            g(case.params, lora_jax.mix(stacked, w), x[i : i + 1]) for i, w in enumerate(weights)
        ]
        return jnp.concatenate(rows)

    @jax.jit
    def values(weights: Any) -> Any:
        pulled = [jax.vjp(fn, weights) for fn in (together, one_by_one)]
        return [(out, back(jnp.cos(out))) for out, back in pulled]

    got, want = values(weights)
    assert_close(got, want)
    assert_close(got[0][1], case.f(case.params, x)[1])


def test_the_base_product_is_done_once() -> None:
    """Whatever n is, W is in one product, of all rows. Red if the experts are looped over."""
    case = cases.REGISTRY["bare_matmul"]()
    layout, stacked = lora_jax.stack(members_of(case, (1,) * 6))
    router = lora_jax.init_router(jax.random.key(0), layout, 6)
    g, (x,) = lora_jax.adapt(layout, case.f), case.args
    choices = {
        "fixed": lora_jax.mix(stacked, jnp.ones(6)),
        "per example": lora_jax.mix(stacked, jnp.ones((len(x), 6))),
        "per token": lora_jax.route(stacked, router, top=2),
    }
    for name, choice in choices.items():
        jaxpr = jax.make_jaxpr(lambda w, c=choice: g({"w": w}, c, x))(case.params["w"])
        dots = [e for e in programs.equations(jaxpr) if e.primitive.name == "dot_general"]
        assert len(dots) == 3, name
        with_w = [e for e in dots if (10, 14) in [v.aval.shape for v in e.invars]]
        assert len(with_w) == 1, name
        assert with_w[0].outvars[0].aval.size == x.size // 10 * 14, name


# --- a router per token -------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_router_without_preference_is_the_mean(name: str) -> None:
    """Through every rule and loop. Red if a rule drops the router's columns or their softmax."""
    case = cases.REGISTRY[name]()
    members = members_of(case)
    layout, stacked = lora_jax.stack(members)
    router = jax.tree.map(jnp.zeros_like, lora_jax.init_router(jax.random.key(0), layout, 3))
    run = jax.jit(runs(case, layout))
    got = run(case.params, lora_jax.route(stacked, router))
    assert_close(got, run(case.params, lora_jax.mix(stacked, jnp.full(3, 1 / 3))), 2e-5)


def f_scanned(p: Any, x: Any) -> Any:
    def layer(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(jax.checkpoint(layer), x, p)[0]


def f_by_hand(p: Any, stacked: Any, router: Any, top: int | None, x: Any) -> tuple[Any, Any]:
    """The same with each expert written out, and the loads `{path: [Load of each layer]}`."""
    loads: dict[str, list[Load]] = {"up": [], "down": []}
    for layer in range(3):
        for path in ("up", "down"):
            gates = jax.nn.softmax(x @ router[path][layer])
            if top is not None:
                least = jnp.sort(gates)[..., -top, None]
                gates = jnp.where(gates >= least, gates, 0)
                gates /= gates.sum(-1, keepdims=True)
            rows = gates.reshape(-1, 3)
            chosen = rows == rows.max(-1, keepdims=True) if top is None else rows > 0
            loads[path].append(Load(chosen.mean(0) / (top or 1), rows.mean(0)))
            factors = Factors(*(z[:, layer] for z in stacked.factors[path]))
            scales = [(i, stacked.scales[path][i]) for i in range(3)]
            x = by_hand(x, p[path][layer], factors, scales, gates)
            x = jnp.tanh(x) if path == "up" else x
    return x, {path: jax.tree.map(lambda *z: jnp.stack(z), *each) for path, each in loads.items()}


@pytest.mark.parametrize("top", [None, 1, 2])
def test_routing_by_token_against_a_sum_by_hand(top: int | None) -> None:
    """Outputs, loads, and the gradients of factors and router, of a loss with the loads in it.

    Through a scan with remat. Red if the softmax is over something else, what is chosen is not
    divided by its sum, or the count is of one layer.
    """
    params = {"up": cases.normal(0, 3, 10, 14) / 4, "down": cases.normal(1, 3, 14, 10) / 4}
    x = cases.normal(2, 2, 5, 10)
    case = cases.Case("scanned", f_scanned, params, (x,), ("up", "down"))
    layout, stacked = lora_jax.stack(members_of(case))
    router = jax.tree.map(lambda r: 9 * r, lora_jax.init_router(jax.random.key(3), layout, 3))

    def fast(stacked: Any, router: Any) -> tuple[Any, Any]:
        routed = lora_jax.route(stacked, router, top)
        y = lora_jax.adapt(layout, f_scanned)(params, routed, x)
        return y, lora_jax.load(layout, f_scanned, params, routed, x)

    def slow(stacked: Any, router: Any) -> tuple[Any, Any]:
        return f_by_hand(params, stacked, router, top, x)

    def derived(fn: Any) -> Any:
        def loss(stacked: Any, router: Any) -> Any:
            y, loads = fn(stacked, router)
            return jnp.sin(y).sum() + 0.3 * lora_jax.balance(loads), (y, loads)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(stacked, router)

    got, (got_stack, got_router) = derived(fast)
    want, (want_stack, want_router) = derived(slow)
    assert_close(got, want)
    assert_close((got_stack.factors, got_router), (want_stack.factors, want_router), 5e-5)
    learns = [bool(jnp.any(g != 0)) for g in jax.tree.leaves(got_router)]
    assert learns == [top != 1] * 2  # the one gate that is left is 1, whatever the logits
