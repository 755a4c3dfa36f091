"""Mixtures of adapters, compared with `select`, `combine` and a sum over experts by hand."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import Factors, Layout, LoraError, LoraSpec
from lora_jax.checkpoint.adapter import restore_about
from lora_jax.multi.moe.statistics import Load
from tests import cases, programs
from tests.programs import compiled
from tests.test_transform import assert_close, scalar

pytestmark = pytest.mark.standard_promotion

# One program for each kind of rule that a weight can meet.
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
# A router per token refuses a product with W.T (embed_tied), a custom_jvp and a sharded
# contraction.
REFUSED = ["bare_custom_jvp", "linen_embed_tied", "shard_map_over_scanned_layers"]
BY_TOKEN = [name for name in PROGRAMS if name not in REFUSED]
BY_TOKEN += ["linen_embed", "bare_while", "bare_cond", "nnx_scan"]


def members_of(case: Any, ranks: tuple[int, ...] = (1, 2, 2)) -> list[Any]:
    """Adapters of a program with different ranks and alphas, none of them zero."""
    members = []
    for i, rank in enumerate(ranks):
        spec = LoraSpec(rank, 1.0 + i, case.targets)
        layout = lora_jax.resolve(spec, case.f, case.params, *case.args, **case.kwargs)
        factors = {
            t.path: Factors(wave(t.a_shape, i), wave(t.b_shape, i + 0.5)) for t in layout.targets
        }
        members.append((layout, factors))
    return members


def wave(shape: tuple[int, ...], phase: float) -> Any:
    drawn = np.cos(np.arange(np.prod(shape)) ** 1.1 + phase).reshape(shape) / 3
    return jax.device_put(drawn.astype(np.float32))


def router_of(layout: Layout, experts: int, seed: int = 0, size: float = 1.0) -> Any:
    """A router drawn by NumPy, with the shapes of a new one."""
    make = lambda: lora_jax.moe.init_router(jax.random.key(0), layout, experts)  # noqa: E731
    draw = np.random.default_rng(seed).standard_normal
    scaled = lambda x: (size * draw(x.shape) / x.shape[-2] ** 0.5).astype(x.dtype)  # noqa: E731
    return jax.device_put(jax.tree.map(scaled, jax.eval_shape(make)))


def runs(case: Any, layout: Layout) -> Any:
    g = lora_jax.adapt(layout, case.f)
    return lambda p, ad: g(p, ad, *case.args, **case.kwargs)


def by_hand(x: Any, w: Any, factors: Factors, scales: Any, gates: Any) -> Any:
    """`x W + sum_i g_i scale_i (x a_i) b_i`, expert by expert."""
    terms = [gates[..., i, None] * s * (x @ factors.a[i] @ factors.b[i]) for i, s in scales]
    return x @ w + sum(terms)


# --- given weights ------------------------------------------------------------------------------


@pytest.mark.few(4)
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_hot_weights_are_select(name: str) -> None:
    """One-hot weights give the outputs and gradients of `select`."""
    case = cases.REGISTRY[name]()
    layout, stacked = compiled(lora_jax.multi.stack, members_of(case))
    loss = scalar(runs(case, layout))

    @jax.jit
    def values(stacked: Any, one_hot: Any) -> Any:
        mixed = lambda s: loss(case.params, lora_jax.moe.mix(s, one_hot))  # noqa: E731
        chosen = lambda s: loss(case.params, lora_jax.multi.select(s, jnp.argmax(one_hot)))  # noqa: E731
        pairs = [jax.value_and_grad(fn)(stacked) for fn in (mixed, chosen)]
        return [(value, gradient.factors) for value, gradient in pairs]

    got, want = values(stacked, jnp.array([0.0, 1.0, 0.0]))
    assert_close(got, want, 2e-5)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", PROGRAMS)
def test_fixed_weights_are_the_combination(name: str) -> None:
    """Fixed weights give the outputs of `combine` and `merge`."""
    case = cases.REGISTRY[name]()
    members, weights = members_of(case), [0.5, -1.5, 0.25]
    layout, stacked = compiled(lora_jax.multi.stack, members)
    combine = functools.partial(lora_jax.multi.combine, weights=weights)
    combined, adapters, _ = compiled(combine, members)
    merged = compiled(lora_jax.merge, combined, case.params, adapters)
    got = jax.jit(runs(case, layout))(case.params, lora_jax.moe.mix(stacked, weights))
    assert_close(got, jax.jit(lambda p: case.f(p, *case.args, **case.kwargs))(merged), 2e-5)


def test_weights_per_example() -> None:
    """Each example has its own blend, zeros give the base, and the weights have gradients."""
    case = cases.REGISTRY["linen_attention"]()
    layout, stacked = compiled(lora_jax.multi.stack, members_of(case))
    weights = jnp.array([[0.2, 0.8, 0.0], [0.0, 0.0, 0.0], [1.0, -1.0, 2.0]])
    g = lora_jax.adapt(layout, case.f)
    (x,) = case.args

    def together(weights: Any) -> Any:
        return g(case.params, lora_jax.moe.mix(stacked, weights), x)

    def one_by_one(weights: Any) -> Any:
        rows = [
            g(case.params, lora_jax.moe.mix(stacked, w), x[i : i + 1])
            for i, w in enumerate(weights)
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
    """For each kind of choice, one product has W, over all rows."""
    case = cases.REGISTRY["bare_matmul"]()
    layout, stacked = lora_jax.multi.stack(members_of(case, (1,) * 6))
    router = router_of(layout, 6)
    g, (x,) = lora_jax.adapt(layout, case.f), case.args
    choices = {
        "fixed": lora_jax.moe.mix(stacked, jnp.ones(6)),
        "per example": lora_jax.moe.mix(stacked, jnp.ones((len(x), 6))),
        "per token": lora_jax.moe.route(stacked, router, top=2),
    }
    for name, choice in choices.items():
        jaxpr = jax.make_jaxpr(lambda w, c=choice: g({"w": w}, c, x))(case.params["w"])
        dots = [e for e in programs.equations(jaxpr) if e.primitive.name == "dot_general"]
        assert len(dots) == 3, name
        with_w = [e for e in dots if (10, 14) in [v.aval.shape for v in e.invars]]
        assert len(with_w) == 1, name
        assert with_w[0].outvars[0].aval.size == x.size // 10 * 14, name


# --- a router per token -------------------------------------------------------------------------


@pytest.mark.few(4)
@pytest.mark.parametrize("name", BY_TOKEN)
def test_a_router_without_preference_is_the_mean(name: str) -> None:
    """A router of zeros gives the mean of the adapters, through every rule and loop."""
    case = cases.REGISTRY[name]()
    members = members_of(case)
    layout, stacked = compiled(lora_jax.multi.stack, members)
    router = router_of(layout, 3, size=0.0)
    run = jax.jit(runs(case, layout))
    got = run(case.params, lora_jax.moe.route(stacked, router))
    assert_close(got, run(case.params, lora_jax.moe.mix(stacked, jnp.full(3, 1 / 3))), 2e-5)


def f_scanned(p: Any, x: Any) -> Any:
    def layer(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(jax.checkpoint(layer), x, p)[0]


def f_by_hand(p: Any, stacked: Any, router: Any, top: int | None, x: Any) -> tuple[Any, Any]:
    """Compute f with each expert written out, and the loads `{path: [Load of each layer]}`."""
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


@pytest.mark.few(1)
@pytest.mark.parametrize("top", [None, 1, 2])
def test_routing_by_token_against_a_sum_by_hand(top: int | None) -> None:
    """Outputs, loads and gradients of a scan with remat equal a sum over experts by hand."""
    params = {"up": cases.normal(0, 3, 10, 14) / 4, "down": cases.normal(1, 3, 14, 10) / 4}
    x = cases.normal(2, 2, 5, 10)
    case = cases.Case("scanned", f_scanned, params, (x,), ("up", "down"))
    layout, stacked = compiled(lora_jax.multi.stack, members_of(case))
    router = router_of(layout, 3, size=9.0)

    def fast(stacked: Any, router: Any) -> tuple[Any, Any]:
        routed = lora_jax.moe.route(stacked, router, top)
        y = lora_jax.adapt(layout, f_scanned)(params, routed, x)
        return y, lora_jax.moe.router_load(layout, f_scanned, params, routed, x)

    def slow(stacked: Any, router: Any) -> tuple[Any, Any]:
        return f_by_hand(params, stacked, router, top, x)

    def derived(fn: Any) -> Any:
        def loss(stacked: Any, router: Any) -> Any:
            y, loads = fn(stacked, router)
            return jnp.sin(y).sum() + 0.3 * lora_jax.moe.balance(loads), (y, loads)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(stacked, router)

    got, (got_stack, got_router) = derived(fast)
    want, (want_stack, want_router) = derived(slow)
    assert_close(got, want)
    assert_close((got_stack.factors, got_router), (want_stack.factors, want_router), 5e-5)
    learns = [bool(jnp.any(g != 0)) for g in jax.tree.leaves(got_router)]
    assert learns == [top != 1] * 2  # with top=1 the remaining gate is 1, for any logits


def test_the_load_of_a_bank_of_experts_is_of_all_its_rows() -> None:
    """The load of a `ragged_dot`, whose rows of all groups are one product, is of all rows."""
    case = cases.REGISTRY["bare_ragged_dot"]()
    layout, stacked = compiled(lora_jax.multi.stack, members_of(case))
    router = router_of(layout, 3, 3)
    routed = lora_jax.moe.route(stacked, router, top=2)
    count = functools.partial(lora_jax.moe.router_load, layout, case.f)
    for load in compiled(count, case.params, routed, *case.args).values():
        assert_close(load.share.sum(-1), jnp.ones(load.share.shape[:-1]))
        assert_close(load.gate.sum(-1), jnp.ones(load.share.shape[:-1]))


def test_the_balance_is_of_shares_and_gates() -> None:
    shares, gates = jnp.array([[0.5, 0.5], [1.0, 0.0]]), jnp.array([[0.6, 0.4], [0.7, 0.3]])
    one = {"w": Load(shares[0], gates[0])}
    assert float(lora_jax.moe.balance(one)) == pytest.approx(2 * (0.5 * 0.6 + 0.5 * 0.4))
    layers = {"w": Load(shares, gates)}
    assert float(lora_jax.moe.balance(layers)) == pytest.approx((1.0 + 2 * 0.7) / 2)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", REFUSED)
def test_a_router_without_an_input_to_route_by_is_refused(name: str) -> None:
    """Half an input is refused: softmax is not linear, so the router would route wrongly."""
    case = cases.REGISTRY[name]()
    layout, stacked = compiled(lora_jax.multi.stack, members_of(case))
    routed = lora_jax.moe.route(stacked, router_of(layout, 3))
    with pytest.raises(LoraError, match=r"a router per token has no whole input to route by"):
        runs(case, layout)(case.params, routed)


def test_the_gates_of_a_bfloat16_model_are_float32() -> None:
    f = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": jnp.ones((8, 4), jnp.bfloat16)}, jnp.ones((3, 8), jnp.bfloat16)
    case = cases.Case("bfloat16", f, params, (x,), ("w",))
    layout, stacked = compiled(lora_jax.multi.stack, members_of(case))
    router = router_of(layout, 3)
    with jax.numpy_dtype_promotion("strict"):
        out = runs(case, layout)(params, lora_jax.moe.route(stacked, router, 2))
        shares = lora_jax.moe.router_load(
            layout, f, params, lora_jax.moe.route(stacked, router, 2), x
        )["w"]
    assert out.dtype == jnp.bfloat16
    assert shares.gate.dtype == jnp.float32
    np.testing.assert_allclose(shares.gate.sum(), 1, atol=1e-6)


def test_vmap_over_routers() -> None:
    """Several routers run at once, as in a sweep."""
    case = cases.REGISTRY["bare_scan"]()
    layout, stacked = compiled(lora_jax.multi.stack, members_of(case))
    run = runs(case, layout)
    routers = [router_of(layout, 3, i) for i in range(2)]
    one = lambda r: run(case.params, lora_jax.moe.route(stacked, r, 2))  # noqa: E731
    together = jax.jit(jax.vmap(one))(jax.tree.map(lambda *r: jnp.stack(r), *routers))
    assert_close(together, jax.tree.map(lambda *y: jnp.stack(y), *map(one, routers)))


# --- training and saving a router ---------------------------------------------------------------


def test_a_router_learns_which_expert_made_which_token() -> None:
    f = lambda p, x: jnp.tanh(x @ p["w"])  # noqa: E731
    params = {"w": cases.normal(0, 8, 6) / 3}
    kinds = jnp.arange(64) % 2
    x = jnp.where(kinds[:, None] == 0, 1.0, -1.0) * jnp.eye(8)[:1] + cases.normal(1, 64, 8) / 4
    case = cases.Case("", f, params, (x,), ("w",))
    own, factors = members_of(case, (2,))[0]
    members = [
        (own, {"w": Factors(2 * ab.a, c * ab.b)}) for ab in factors.values() for c in (2, -2)
    ]
    layout, stacked = compiled(lora_jax.multi.stack, members)
    answers = [f(lora_jax.merge(own, params, ad), x) for own, ad in members]
    wanted = jnp.where(kinds[:, None] == 0, *answers)
    g, tx = lora_jax.adapt(layout, f), optax.adam(0.05)

    def loss(router: Any) -> Any:
        return ((g(params, lora_jax.moe.route(stacked, router), x) - wanted) ** 2).mean()

    def step(carry: Any, _: Any) -> Any:
        router, state = carry
        value, gradient = jax.value_and_grad(loss)(router)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(router, updates), state), value

    router = router_of(layout, 2)
    start = (router, tx.init(router))
    (router, _), losses = jax.jit(lambda c: jax.lax.scan(step, c, length=300))(start)
    assert losses[0] > 0.01
    assert losses[-1] < losses[0] / 20
    picked = jnp.argmax(x @ router["w"], axis=-1)
    assert (picked == kinds).mean() > 0.95
    served = lora_jax.moe.router_load(
        layout, f, params, lora_jax.moe.route(stacked, router, top=1), x
    )["w"]
    np.testing.assert_allclose(served.share, 0.5, atol=0.05)


def test_experts_and_router_are_kept_as_adapters_are(tmp_path: Any) -> None:
    """The recipe in `lora_jax.moe.router` keeps experts and router: restore(save(x)) == x."""
    case = cases.REGISTRY["bare_scan"]()
    members = members_of(case)
    layout, stacked = compiled(lora_jax.multi.stack, members)
    router = router_of(layout, 3)
    for i, (own, _) in enumerate(members):
        lora_jax.save(
            tmp_path / str(i), lora_jax.Adapter(own, lora_jax.multi.unstack(own, stacked, i))
        )
    lora_jax.save(tmp_path / "router", lora_jax.Adapter(Layout(), {}, router), about={"top": 2})
    again, restored = lora_jax.multi.stack([lora_jax.restore(tmp_path / str(i)) for i in range(3)])
    assert again == layout
    assert all(map(jnp.array_equal, *map(jax.tree.leaves, (restored, stacked))))
    kept = lora_jax.restore(tmp_path / "router").trainable
    assert kept.keys() == router.keys()
    assert all(jnp.array_equal(kept[p], router[p]) for p in router)
    assert restore_about(tmp_path / "router") == {"top": 2}


def test_errors_say_what_is_expected() -> None:
    case = cases.REGISTRY["bare_scan"]()
    layout, stacked = compiled(lora_jax.multi.stack, members_of(case))
    router = router_of(layout, 3)
    with pytest.raises(LoraError, match=r"must be \[3\] or \[examples, 3\]; got \[2\]"):
        lora_jax.moe.mix(stacked, [0.5, 0.5])
    with pytest.raises(LoraError, match=r"floats, got int32; .* it is lora_jax.multi.select"):
        lora_jax.moe.mix(stacked, [0, 1, 2])
    with pytest.raises(LoraError, match="top must be from 1 to 3"):
        lora_jax.moe.route(stacked, router, top=4)
    with pytest.raises(LoraError, match=r"the router has no 'down'; nearest in it:\n  up"):
        lora_jax.moe.route(stacked, {"up": router["up"]})
    with pytest.raises(LoraError, match=r"the stack has no 'side'; nearest"):
        lora_jax.moe.route(stacked, router | {"side": router["up"]})
    with pytest.raises(LoraError, match=r"\(3, 10, 2\), for 3 experts it must be \(3, 10, 3\)"):
        lora_jax.moe.route(stacked, router | {"up": router["up"][..., :2]})
    f = lambda p, x: case.f(p, x)[0].argmax()  # noqa: E731
    with pytest.raises(LoraError, match="no floating output"):
        lora_jax.moe.router_load(
            layout, f, case.params, lora_jax.moe.route(stacked, router), *case.args
        )
    wider, _ = lora_jax.multi.stack(members_of(case, (1, 3)))
    with pytest.raises(LoraError, match="the arrays do not fit the layout"):
        runs(case, wider)(case.params, lora_jax.moe.mix(stacked, jnp.ones(3)))
