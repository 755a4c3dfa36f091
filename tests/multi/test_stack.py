"""Many adapters as one: `select(stack(xs), i) == xs[i]`, alone and in a mixed batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import Factors, LoraError, LoraSpec, models
from lora_jax.multi import segmented_matmul
from tests import cases, programs
from tests.programs import compiled
from tests.test_built_in_models import BERT, LLAMA
from tests.test_transform import assert_close, scalar, weighted

pytestmark = pytest.mark.standard_promotion

Pair = tuple[lora_jax.Layout, Any]


def adapter(layout: lora_jax.Layout, seed: int) -> Pair:
    """Draw random factors, b included."""
    leaves, tree = jax.tree.flatten(
        jax.eval_shape(lambda: lora_jax.init(jax.random.key(0), layout))
    )
    draw = np.random.default_rng(seed).standard_normal
    return layout, jax.tree.unflatten(
        tree, [jax.device_put((0.3 * draw(x.shape)).astype(x.dtype)) for x in leaves]
    )


def three(f: Any, params: Any, args: Any, targets: Any, kwargs: Any = None) -> list[Pair]:
    """Draw adapters that differ in rank, alpha and, if the program has several, targets."""
    resolved = [
        lora_jax.resolve(LoraSpec(rank, alpha, targets), f, params, *args, **(kwargs or {}))
        for rank, alpha in ((1, 3.0), (2, 1.0), (2, 5.0))
    ]
    if len(resolved[0].targets) > 1:
        resolved[0] = lora_jax.Layout(resolved[0].targets[1:])
    return [adapter(layout, seed) for seed, layout in enumerate(resolved)]


@pytest.mark.few(5)
@pytest.mark.parametrize("name", cases.ONE_OF_EACH)
def test_one_of_a_stack_is_that_adapter(name: str) -> None:
    case = cases.REGISTRY[name]()
    pairs = three(case.f, case.params, case.args, case.targets, case.kwargs)
    layout, stacked = compiled(lora_jax.multi.stack, pairs)
    g = lora_jax.adapt(layout, case.f)

    def chosen(params: Any, stacked: Any, index: Any) -> Any:
        return g(params, lora_jax.multi.select(stacked, index), *case.args, **case.kwargs)

    run = jax.jit(chosen)
    gradient = None
    if case.reverse:
        loss = lambda s, p, i: scalar(lambda p, s: chosen(p, s, i))(p, s)  # noqa: E731
        gradient = jax.jit(jax.grad(loss))
    for index, (own, adapters) in enumerate(pairs[1:], 1):

        def alone(params: Any, adapters: Any, own: Any = own) -> Any:
            return case.f(lora_jax.merge(own, params, adapters), *case.args, **case.kwargs)

        assert_close(run(case.params, stacked, index), jax.jit(alone)(case.params, adapters))
        if gradient is not None and index == 1:
            got = jax.device_get(gradient(stacked, case.params, index).factors)
            want = jax.jit(jax.grad(scalar(alone), 1))(case.params, adapters)
            mine = lora_jax.multi.unpad(own, jax.tree.map(lambda x: x[1], got))
            assert_close(mine, want, tolerance=3e-5)
            others = jax.tree.map(lambda x: np.delete(x, 1, axis=0), got)
            assert not any(np.any(x) for x in jax.tree.leaves(others))
    base = run(case.params, stacked, lora_jax.multi.BASE)
    assert_close(base, jax.jit(lambda p: case.f(p, *case.args, **case.kwargs))(case.params))


def model(config: Any, **changes: Any) -> tuple[Any, Any, Any]:
    """A built-in model as a function, its parameters, and five examples with their masks."""
    ids = jnp.arange(30).reshape(5, 6) % 29
    if isinstance(config, models.BertConfig):
        module: Any = models.BertClassifier(dataclasses.replace(config, **changes), 3, "mean")
        args: Any = (ids, jnp.arange(6)[None] < jnp.array([6, 4, 5, 2, 6])[:, None])
    else:
        module, args = models.DecoderModel(dataclasses.replace(config, **changes)), (ids,)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]
    params = cases.near_ones_and_zeros(shapes)
    return (lambda p, *a: module.apply({"params": p}, *a)), params, args


def of_case(name: str) -> Callable[[], tuple[Any, Any, Any]]:
    def make() -> tuple[Any, Any, Any]:
        case = cases.REGISTRY[name]()
        return case.f, case.params, case.args

    return make


MIXED: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], Any]] = {
    "bert": (lambda: model(BERT, num_layers=1), "all-linear"),
    "llama_scanned": (lambda: model(LLAMA, scan_layers=True, remat="full"), "all-linear"),
    "linen_conv_2d_strided": (of_case("linen_conv_2d_strided"), "**/kernel"),
    "linen_embed_tied": (of_case("linen_embed_tied"), "**/embedding"),
    "nnx_attention": (of_case("nnx_attention"), "all-linear"),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", MIXED)
def test_a_mixed_batch_is_its_examples_one_at_a_time(name: str) -> None:
    """A mixed batch, with the base in it, equals its examples one at a time."""
    make, targets = MIXED[name]
    f, params, args = make()
    pairs = three(f, params, args, targets)
    layout, stacked = compiled(lora_jax.multi.stack, pairs)
    count = len(args[0])
    ids = jnp.array([2, 0, lora_jax.multi.BASE, 2, 1])[:count]
    g = lora_jax.adapt(layout, f)

    def mixed(params: Any, stacked: Any, ids: Any) -> Any:
        return g(params, lora_jax.multi.select(stacked, ids), *args)

    def one(params: Any, stacked: Any, n: Any, index: Any) -> Any:
        row = [jax.lax.dynamic_slice_in_dim(x, n, 1) for x in args]
        return g(params, lora_jax.multi.select(stacked, index), *row)

    def alone(params: Any, stacked: Any, ids: Any) -> Any:
        rows = jax.lax.map(lambda x: one(params, stacked, *x), (jnp.arange(count), ids))
        return jax.tree.map(lambda x: x[:, 0], rows)

    def derived(fn: Any) -> Any:
        """(gradient of the stack, outputs)"""

        def loss(stacked: Any) -> Any:
            out = fn(params, stacked, ids)
            return weighted(out), out

        return jax.jit(jax.grad(loss, has_aux=True))(stacked)

    (got, outputs), (want, expected) = map(derived, (mixed, alone))
    assert_close(outputs, expected)
    assert_close(got.factors, want.factors, tolerance=5e-5)
    assert any(np.any(x) for x in jax.tree.leaves(got.factors))


def test_the_base_product_stays_one_for_all_examples() -> None:
    """Base products have no batch axis of examples."""
    f, params, args = model(BERT)
    layout, stacked = compiled(lora_jax.multi.stack, three(f, params, args, "all-linear"))
    g = lora_jax.adapt(layout, f)
    ids = jnp.arange(5) % 3
    traced = jax.make_jaxpr(lambda p: g(p, lora_jax.multi.select(stacked, ids), *args))(params)
    shapes = {t.shape for t in layout.targets}
    found = 0
    for eqn in programs.equations(traced):
        if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.shape in shapes:
            assert eqn.params["dimension_numbers"][1] == ((), ())
            assert eqn.outvars[0].aval.shape[0] == 5
            found += 1
    assert found == len(layout.targets)


def test_single_tokens_with_few_adapters_are_grouped() -> None:
    """Single tokens with few adapters are grouped, as when texts are continued."""
    f, params, _ = model(LLAMA)
    ids = jax.random.randint(jax.random.key(0), (64, 1), 0, 29)
    specs = [LoraSpec(rank, 2.0 * rank + 1) for rank in (6, 5, 6)]
    layouts = [lora_jax.resolve(spec, f, params, ids[:1]) for spec in specs]
    members = [adapter(own, seed) for seed, own in enumerate(layouts)]
    layout, stacked = compiled(lora_jax.multi.stack, members)
    g = lora_jax.adapt(layout, f)
    choice = jax.random.randint(jax.random.key(1), (64,), 0, 4) - 1

    def mixed(stacked: Any, choice: Any) -> Any:
        return g(params, lora_jax.multi.select(stacked, choice), ids)

    run, alone = jax.jit(mixed), jax.jit(lambda chosen, ids: g(params, chosen, ids))
    blocks = segmented_matmul.blocks(64, 4)
    target = layout["layers_0/mlp/gate/kernel"]
    text = run.lower(stacked, choice).as_text()
    assert f"tensor<{blocks}x{target.fan_in}x{target.rank}xf32>" in text
    got = run(stacked, choice)
    for index in (-1, 2):
        rows = np.flatnonzero(np.asarray(choice) == index)[:5]
        want = alone(lora_jax.multi.select(stacked, index), ids[rows])
        assert_close(got[rows], want)


def test_a_hundred_swaps_compile_nothing(compilations: list[str]) -> None:
    """Swaps of adapters of ranks 1 to 16, by number and by `put`, compile nothing."""
    f, params, args = model(BERT, hidden_size=16)
    targets = "**/{query,value}/kernel"
    pairs, once = [], jax.jit(f)  # traced once for all layouts
    for rank in range(1, 17):
        layout = lora_jax.resolve(LoraSpec(rank, 2.0 + rank, targets), once, params, *args)
        pairs.append(adapter(layout, rank))
    stack = functools.partial(lora_jax.multi.stack, size=16)
    layout, stacked = compiled(stack, [pairs[-1], *pairs[:11]])
    g = lora_jax.adapt(layout, f)
    run = jax.jit(lambda stacked, ids: g(params, lora_jax.multi.select(stacked, ids), *args))
    one = run(stacked, 0)
    run(stacked, jnp.zeros(5, jnp.int32))
    stacked = lora_jax.multi.put(layout, stacked, 15, pairs[0])
    jax.block_until_ready(run(stacked, lora_jax.multi.BASE))
    ready = [(jnp.full(5, i, jnp.int32), pair) for i, pair in enumerate(pairs)]
    jax.block_until_ready(ready)
    compilations.clear()
    for swap in range(100):
        ids, pair = ready[swap % len(ready)]
        stacked = lora_jax.multi.put(layout, stacked, 15, pair)  # its rank is new to the process
        run(stacked, swap % 12)
        run(stacked, ids)
        run(stacked, 15)
    assert compilations == []
    np.testing.assert_array_equal(run(stacked, 0), one)


def test_resident_adapters_cost_their_own_bytes_alone() -> None:
    """Resident adapters cost only their own bytes: 200 and 64 need equal temporaries and FLOPs."""
    f, params, args = model(BERT)
    layout = lora_jax.resolve(LoraSpec(2, 4.0, "**/{query,value}/kernel"), f, params, *args)
    g = lora_jax.adapt(layout, f)
    found = []
    for count in (64, 200):
        _, stacked = lora_jax.multi.stack([adapter(layout, 0)], size=count)
        run = jax.jit(lambda s, ids: g(params, lora_jax.multi.select(s, ids), *args))
        program = run.lower(stacked, jnp.zeros(5, jnp.int32)).compile()
        memory, own = program.memory_analysis(), 4 * layout.size + 4 * len(layout.targets)
        found.append((memory.temp_size_in_bytes, program.cost_analysis()["flops"]))
        assert abs(memory.argument_size_in_bytes - (count + 1) * own) < 1000
    assert found[0] == found[1]


def test_put_writes_one_slot_and_unstack_reads_it_back() -> None:
    f, params, args = model(BERT)
    pairs = three(f, params, args, "all-linear")
    layout, stacked = compiled(functools.partial(lora_jax.multi.stack, size=5), pairs)
    assert stacked.size == 5
    before = jax.tree.map(np.asarray, stacked.factors)
    stacked = lora_jax.multi.put(layout, stacked, 4, pairs[1])
    for index, (own, adapters) in ((0, pairs[0]), (2, pairs[2]), (4, pairs[1])):
        got = compiled(lora_jax.multi.unstack, own, stacked, index)
        jax.tree.map(np.testing.assert_array_equal, got, adapters)
    for path, factors in stacked.factors.items():
        np.testing.assert_array_equal(factors.a[:4], before[path].a[:4])
        np.testing.assert_array_equal(factors.a[5], 0)  # the base
    scale = stacked.scales[pairs[1][0].targets[0].path]
    assert scale.shape == (6,) and float(scale[4]) == 0.5 and float(scale[5]) == 0


def test_padding_stays_zero_under_adamw_with_decay() -> None:
    import optax

    f, params, args = model(BERT)
    own, adapters = three(f, params, args, "all-linear")[0]
    layout = lora_jax.resolve(LoraSpec(6, 4.0), f, params, *args)
    whole = lora_jax.multi.pad(layout, own, adapters)
    g = lora_jax.adapt(layout, f)
    tx = optax.adamw(1e-2, weight_decay=0.1)

    @jax.jit
    def step(factors: Any, state: Any) -> Any:
        def loss(factors: Any) -> Any:
            return jnp.square(g(params, dataclasses.replace(whole, factors=factors), *args)).mean()

        updates, state = tx.update(jax.grad(loss)(factors), state, factors)
        return optax.apply_updates(factors, updates), state

    factors, state = whole.factors, tx.init(whole.factors)
    for _ in range(3):
        factors, state = step(factors, state)
    trained = lora_jax.multi.unpad(own, factors)
    again = lora_jax.multi.pad(layout, own, trained).factors
    jax.tree.map(np.testing.assert_array_equal, factors, again)
    moved = [not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (trained, adapters)))]  # noqa: B905
    assert all(moved)


def test_examples_draw_apart_from_each_other() -> None:
    """A scalar key is folded with the example's number."""
    f = lambda p, x, key: x @ p["w"] * jax.random.bernoulli(key, 0.5, (1, 8))  # noqa: E731
    params, x = {"w": jnp.ones((4, 8))}, jnp.ones((6, 4))
    args = (x[:1], jax.random.key(0))
    layout, stacked = lora_jax.multi.stack(three(f, params, args, "w"))
    g = lora_jax.adapt(layout, f)
    y = g(params, lora_jax.multi.select(stacked, jnp.zeros(6, jnp.int32)), x, jax.random.key(0))
    assert len({row.tobytes() for row in np.asarray(y != 0)}) > 3


def test_axes_of_the_examples() -> None:
    def f(p: Any, x: Any, table: Any) -> Any:  # x [T, B, D], time first
        return {"y": x @ p["w"] + table, "loss": jnp.sum(x @ p["w"])}

    params, x = {"w": jnp.ones((4, 8))}, cases.normal(0, 3, 5, 4)
    table = jnp.ones((1, 1, 8))
    layout, stacked = compiled(lora_jax.multi.stack, three(f, params, (x, table), "w"))
    g = jax.jit(lora_jax.adapt(layout, f, in_axes=(1, None), out_axes=1))
    ids = np.array([0, 1, 2, -1, 1])
    out = jax.device_get(g(params, lora_jax.multi.select(stacked, ids), x, table))
    assert out["y"].shape == (3, 5, 8) and out["loss"].shape == (5,)
    for n, index in enumerate(ids):
        want = g(params, lora_jax.multi.select(stacked, index), x[:, n : n + 1], table)
        assert_close(out["y"][:, n : n + 1], want["y"])
        assert_close(out["loss"][n], want["loss"])


def test_on_a_mesh() -> None:
    axes = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=axes)
    f, params, _ = model(BERT)
    rows = jnp.arange(48).reshape(8, 6) % 29
    args = (rows, jnp.ones((8, 6), bool))
    layout, stacked = compiled(lora_jax.multi.stack, three(f, params, args, "all-linear"))
    ids = jnp.array([0, 1, 2, -1, 2, 2, 0, 1])
    g = lora_jax.adapt(layout, f)

    def loss(stacked: Any, params: Any, ids: Any, *args: Any) -> Any:
        return scalar(lambda p, s: g(p, lora_jax.multi.select(s, ids), *args))(params, stacked)

    gradient = jax.jit(jax.grad(loss))
    want = gradient(stacked, params, ids, *args)

    def place(path: Any, x: Any) -> Any:
        cut = x.ndim == 2 and x.shape[1] % 4 == 0
        return jax.device_put(x, NamedSharding(mesh, P(None, "tensor") if cut else P()))

    params = jax.tree_util.tree_map_with_path(place, params)
    stacked = jax.device_put(stacked, NamedSharding(mesh, P()))
    ids, *args = jax.device_put((ids, *args), NamedSharding(mesh, P("data")))  # type: ignore[assignment]
    assert_close(gradient(stacked, params, ids, *args).factors, want.factors, tolerance=5e-5)


def test_errors_say_what_to_do() -> None:
    f = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": jnp.ones((4, 8))}, jnp.ones((3, 4))
    pairs = three(f, params, (x,), "w")
    layout, stacked = lora_jax.multi.stack(pairs)
    g = lora_jax.adapt(layout, f)
    with pytest.raises(LoraError, match="no adapters to stack"):
        lora_jax.multi.stack([])
    with pytest.raises(LoraError, match="do not fit into size=2"):
        lora_jax.multi.stack(pairs, size=2)
    with pytest.raises(LoraError, match=r"no adapter 3 in a stack of 3.*-1 is the base"):
        lora_jax.multi.select(stacked, jnp.array([0, 3, 1]))
    with pytest.raises(LoraError, match="no adapter -2"):
        lora_jax.multi.select(stacked, -2)
    with pytest.raises(LoraError, match="ids must be an integer"):
        lora_jax.multi.select(stacked, jnp.array([0.0]))
    with pytest.raises(LoraError, match=r"2 adapter ids.*in_axes"):
        g(params, lora_jax.multi.select(stacked, jnp.array([0, 1])), x)
    whole = lora_jax.adapt(layout, lambda p, x: (x @ p["w"])[0, :5])
    with pytest.raises(LoraError, match="out_axes"):
        whole(params, lora_jax.multi.select(stacked, jnp.array([0, 1, 1])), x)
    with pytest.raises(LoraError, match="no slot 3"):
        lora_jax.multi.put(layout, stacked, 3, pairs[0])
    big = adapter(lora_jax.resolve(LoraSpec(4, targets="w"), f, params, x), 0)
    with pytest.raises(LoraError, match=r"rank 4.*room for .lora., rank 2"):
        lora_jax.multi.put(layout, stacked, 0, big)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pairs[0][1])
    with pytest.raises(LoraError, match="bfloat16"):
        lora_jax.multi.stack([(pairs[0][0], half), pairs[1]])
    other = lora_jax.Layout((dataclasses.replace(layout.targets[0], inputs=(1,), outputs=(0,)),))
    with pytest.raises(LoraError, match="differs among the adapters"):
        lora_jax.multi.union([layout, other])
    renamed = lora_jax.Layout((dataclasses.replace(layout.targets[0], path="v"),))
    with pytest.raises(LoraError, match="no room for the target 'v'"):
        lora_jax.multi.pad(layout, renamed, {"v": Factors(jnp.ones((4, 2)), jnp.ones((2, 8)))})


def test_a_number_that_is_no_slot_gives_nan_in_a_compiled_program() -> None:
    f = lambda p, x: x @ p["w"]  # noqa: E731
    params, x = {"w": jnp.ones((4, 8))}, jnp.ones((3, 4))
    layout, stacked = lora_jax.multi.stack(three(f, params, (x,), "w"))
    g = lora_jax.adapt(layout, f)
    run = jax.jit(lambda ids: g(params, lora_jax.multi.select(stacked, ids), x))
    assert np.isnan(run(3)).all() and np.isnan(run(-2)).all()
    np.testing.assert_array_equal(np.isnan(run(jnp.array([-1, -2, 3]))).all(1), [False, True, True])
