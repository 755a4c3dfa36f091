"""Each cell of the table of kinds and consumers in docs/kinds.md has a test here, or a refusal."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import Adapter, Layout, LoraError, LoraSpec, Rule, analysis
from lora_jax.multi import BASE, select, stack
from lora_jax.updates import kind_of
from tests.cases import normal
from tests.programs import compiled
from tests.test_transform import assert_close, weighted
from tests.updates import forms

ROOT = pathlib.Path(__file__).resolve().parents[2]
KINDS = ["lora", "parts", "dora", "vera", "loha", "lokr", "miss", "ia3", "oft", "tokens", "bias"]
ADDITIVE = ["lora", "parts", "vera", "loha", "lokr", "miss", "tokens"]
CONSUMERS = (
    "adapt",
    "merge",
    "save, restore",
    "partition_specs",
    "dropout",
    "stack, select",
    "mix, route",
    "combine, truncate",
    "analysis",
    "quantised base",
    "init_from_base",
    "init_from_inputs",
)
REFUSED = {
    "stack, select": ["bias"],
    "mix, route": ["dora", "ia3", "oft", "bias"],
    "combine, truncate": ["dora", "ia3", "oft", "bias"],
    "analysis": ["bias"],
    "init_from_base": ["parts", "vera", "loha", "lokr", "miss", "ia3", "oft", "tokens", "bias"],
    "init_from_inputs": ["vera", "lokr", "miss", "ia3", "oft", "tokens"],
}


OTHER_RANK = {"lokr": 1, "oft": 2}  # of the second adapter of a stack; OFT has one rank
UNDROPPED = ("ia3", "oft", "bias")  # nothing that reads x is added


def model(p: Any, x: Any) -> Any:
    """Scanned layers, each with a bias, and an output of another width."""

    def layer(h: Any, w: Any) -> Any:
        return h + jnp.tanh(h @ w["kernel"] + w["bias"][None]), None

    return jax.lax.scan(layer, x, p["layers"])[0] @ p["out"]


PARAMS = {
    "layers": {"kernel": normal(0, 3, 12, 12) / 3, "bias": normal(1, 3, 12) / 3},
    "out": normal(2, 12, 9),
}
X = normal(3, 5, 12)
bare = jax.jit(model)
merge = jax.jit(lora_jax.merge, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def adapted(layout: Layout, params: Any, adapters: Any, x: Any) -> Any:
    return lora_jax.adapt(layout, model)(params, adapters, x)


@functools.cache
def layout_of(kind: str, rank: int = 2) -> Layout:
    targets: Any = ("layers/kernel", "out")
    if kind == "parts":
        targets = (Rule("layers/kernel", parts=((0, 4), (8, 4))), Rule("out", parts=((3, 6),)))
    if kind == "tokens":
        targets = (Rule("layers/kernel", parts=((1, 1), (4, 2))), Rule("out", parts=((3, 6),)))
    if kind == "bias":
        targets = ("layers/bias",)
    name = "lora" if kind == "parts" else kind
    return lora_jax.resolve(LoraSpec(rank, 3.0, targets, kind=name), model, PARAMS, X)


def adapter_of(kind: str, rank: int = 2, seed: int = 0) -> tuple[Layout, Any]:
    layout = layout_of(kind, rank)
    found = {}
    for t in layout.targets:
        arrays = forms.arrays(t, seed)
        small = jax.tree.map(lambda x: jax.device_put(0.5 * np.asarray(x)), arrays)
        found[t.path] = small._replace(magnitude=arrays.magnitude) if kind == "dora" else small
    return layout, found


@functools.cache
def int8_base() -> tuple[Any, Any]:
    """Return the parameters in int8, and their values as floats."""
    q = lora_jax.quantize(PARAMS, "int8", layout_of("lora"))
    return q, jax.jit(lora_jax.dequantize)(q)


def cells(consumer: str, *, refused: bool = False) -> Any:
    bad = REFUSED.get(consumer, [])
    return pytest.mark.parametrize("kind", [k for k in KINDS if (k in bad) == refused])


def test_the_table_in_the_docs_is_this_one() -> None:
    text = (ROOT / "docs/kinds.md").read_text()
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].strip("`") in CONSUMERS and len(cells) == len(KINDS) + 1:
            rows[cells[0].strip("`")] = cells[1:]
    assert tuple(rows) == CONSUMERS
    for consumer, row in rows.items():
        bad = REFUSED.get(consumer, [])
        assert [cell.startswith("no") for cell in row] == [k in bad for k in KINDS], consumer


@pytest.mark.parametrize("kind", KINDS)
def test_adapt_and_merge(kind: str) -> None:
    layout, adapters = adapter_of(kind)
    fast = lambda ad: adapted(layout, PARAMS, ad, X)  # noqa: E731
    slow = lambda ad: bare(merge(layout, PARAMS, ad), X)  # noqa: E731
    both = lambda fn: jax.jit(jax.value_and_grad(lambda ad: weighted(fn(ad))))(adapters)  # noqa: E731
    assert_close(both(fast), both(slow))


@pytest.mark.parametrize("kind", KINDS)
def test_save_restore(kind: str, tmp_path: pathlib.Path) -> None:
    layout, adapters = adapter_of(kind)
    print_of = lora_jax.fingerprint(PARAMS)
    lora_jax.save(tmp_path / "a", Adapter(layout, adapters), fingerprint=print_of)
    again = lora_jax.restore(tmp_path / "a", params=PARAMS)
    assert again.layout == layout
    for t in layout.targets:
        assert type(again.parameters[t.path]) is kind_of(t).fields
    jax.tree.map(np.testing.assert_array_equal, again.parameters, adapters)


@pytest.mark.parametrize("kind", KINDS)
def test_partition_specs(kind: str) -> None:
    layout, adapters = adapter_of(kind)
    specs = {
        "layers": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
        "out": P("fsdp", None),
    }
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    found = lora_jax.partition_specs(layout, specs)
    put = lambda x, spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))  # noqa: E731
    placed = jax.tree.map(put, adapters, found)
    params = jax.tree.map(put, PARAMS, specs)
    assert_close(adapted(layout, params, placed, X), adapted(layout, PARAMS, adapters, X))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind: str) -> None:
    layout, adapters = adapter_of(kind)
    got = adapted(layout, PARAMS, lora_jax.dropout(adapters, jax.random.key(0), 0.5), X)
    assert np.allclose(got, adapted(layout, PARAMS, adapters, X)) == (kind in UNDROPPED)


@pytest.mark.few(5)
@cells("stack, select")
def test_a_mixed_batch(kind: str) -> None:
    """Each example has the output of its adapter alone, also with another rank or without one."""
    members = [adapter_of(kind, 2, seed=1), adapter_of(kind, OTHER_RANK.get(kind, 3), seed=2)]
    first = members[0][0].subset("out")
    members.append((first, {"out": adapter_of(kind, 2, seed=3)[1]["out"]}))
    layout, stacked = compiled(stack, members)
    ids = jnp.array([0, BASE, 1, 2, 0])
    run = functools.partial(adapted, layout)
    got = run(PARAMS, select(stacked, ids), X)
    for i, own in enumerate(ids):
        alone = X[i : i + 1]
        if own == BASE:
            want = bare(PARAMS, alone)
        else:
            theirs, adapters = members[int(own)]
            want = bare(merge(theirs, PARAMS, adapters), alone)
        np.testing.assert_allclose(got[i], want[0], rtol=2e-5, atol=2e-5)
        one = run(PARAMS, select(stacked, own), X)
        np.testing.assert_allclose(one[i], want[0], rtol=2e-5, atol=2e-5)
    both = members[1][0]
    if kind in ("lora", "dora"):
        again = compiled(lora_jax.multi.unstack, both, stacked, 1)
        jax.tree.map(np.testing.assert_array_equal, again, members[1][1])
    swapped = lora_jax.multi.put(layout, stacked, 0, Adapter(*members[1]))
    other = run(PARAMS, select(swapped, 0), X)
    np.testing.assert_allclose(other, run(PARAMS, select(swapped, 1), X), rtol=1e-6, atol=1e-6)


def test_the_base_slot_of_dora_is_the_base_bit_for_bit() -> None:
    layout, stacked = compiled(stack, [adapter_of("dora")])
    w = {"out": PARAMS["out"]}
    f = lambda p, x: x @ p["out"]  # noqa: E731
    own = layout.subset("out")
    only = lora_jax.multi.Stack({"out": stacked.factors["out"]}, {"out": stacked.scales["out"]}, 1)
    g = jax.jit(lora_jax.adapt(own, f))
    np.testing.assert_array_equal(g(w, select(only, BASE), X), jax.jit(f)(w, X))
    ids = jnp.full(5, BASE)
    got = g(w, select(only, ids), X)
    each = jax.jit(jax.vmap(lambda w, x: f(w, x[None])[0], (None, 0)))
    np.testing.assert_array_equal(got, each(w, X))


def test_gradients_of_a_mixed_batch_of_dora() -> None:
    members = [adapter_of("dora", 2, 1), adapter_of("dora", 3, 2)]
    layout, stacked = compiled(stack, members)
    ids = jnp.array([0, 1, 1, 0, 1])

    def loss(factors: Any) -> Any:
        changed = lora_jax.multi.Stack(factors, stacked.scales, stacked.size)
        return weighted(adapted(layout, PARAMS, select(changed, ids), X))

    got = jax.jit(jax.grad(loss))(stacked.factors)
    for i, (own, adapters) in enumerate(members):
        mine = (np.asarray(ids) == i)[:, None]

        def share(ad: Any, own: Any = own, mine: Any = mine) -> Any:
            return _share(adapted(own, PARAMS, ad, X), mine)

        of_stack = lora_jax.multi.Stack(got, stacked.scales, 2)
        found = compiled(lora_jax.multi.unstack, own, of_stack, i)
        assert_close(found, jax.jit(jax.grad(share))(adapters))


def _share(out: Any, mine: Any) -> Any:
    """`weighted`, over the examples of one adapter."""
    return weighted(out) - weighted(jnp.where(mine, jax.lax.stop_gradient(out), out))


@cells("stack, select", refused=True)
def test_what_cannot_be_stacked(kind: str) -> None:
    with pytest.raises(LoraError, match=f"'layers/bias': an update of the kind '{kind}'"):
        stack([adapter_of(kind)])


def test_two_kinds_at_one_path_are_refused_by_name() -> None:
    with pytest.raises(LoraError, match=r"'dora' in adapter 1, and by 'lora' in one before it"):
        stack([adapter_of("lora"), adapter_of("dora")])
    layout, stacked = compiled(stack, [adapter_of("lora")])
    with pytest.raises(LoraError, match=r"it has kind 'dora'.*room for 'lora'"):
        lora_jax.multi.put(layout, stacked, 0, Adapter(*adapter_of("dora")))
    still, adapters = adapter_of("dora")
    zero = Layout(tuple(dataclasses.replace(t, alpha=0.0) for t in still.targets))
    with pytest.raises(LoraError, match="has alpha = 0"):
        stack([(zero, adapters)])


@cells("mix, route")
def test_mixtures(kind: str) -> None:
    members = [adapter_of(kind, 2, seed) for seed in (1, 2)]
    layout, stacked = compiled(stack, members)
    weights = [0.7, -0.4]
    f = lambda p, x: x @ p["out"]  # noqa: E731
    own = layout.subset("out")
    g = lora_jax.adapt(own, f)
    got = compiled(lambda stacked: g(PARAMS, lora_jax.moe.mix(stacked, weights), X), stacked)
    base, x = np.asarray(PARAMS["out"]), np.asarray(X)
    want = x @ base
    for weight, (theirs, adapters) in zip(weights, members, strict=True):
        merged = merge(theirs, PARAMS, adapters)
        want = want + weight * (x @ (np.asarray(merged["out"]) - base))
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    router = lora_jax.moe.init_router(jax.random.key(0), layout, 2)
    out = adapted(layout, PARAMS, lora_jax.moe.route(stacked, router, top=1), X)
    assert np.isfinite(out).all()


def test_dora_cannot_be_mixed() -> None:
    _, stacked = compiled(stack, [adapter_of("dora")])
    with pytest.raises(LoraError, match=r"(?s)Directed, whose update rescales W.*select"):
        lora_jax.moe.mix(stacked, [1.0])
    with pytest.raises(LoraError, match=r"(?s)Directed, whose update rescales W.*select"):
        lora_jax.moe.route(stacked, {}, top=1)


@cells("combine, truncate")
def test_combine_and_truncate(kind: str) -> None:
    layout, adapters = adapter_of(kind)
    combine = functools.partial(lora_jax.multi.combine, weights=[2.0, -1.0])
    both, combined, _ = compiled(combine, [(layout, adapters)] * 2)
    want = jax.device_get(merge(layout, PARAMS, adapters))
    assert_close(merge(both, PARAMS, combined), want)
    (small, kept, _), lost = compiled(lora_jax.multi.truncate, Adapter(layout, adapters), 1)
    assert all(t.rank == 1 for t in small.targets)
    change = jax.device_get(merge(small, PARAMS, kept))
    for t in small.targets:
        leaf = lora_jax.paths.flatten(change)[t.path]
        error = np.linalg.norm(leaf - lora_jax.paths.flatten(want)[t.path])
        np.testing.assert_allclose(lost[t.path].error, error, rtol=1e-3, atol=1e-4)


@cells("combine, truncate", refused=True)
def test_what_does_not_add_up(kind: str) -> None:
    layout, adapters = adapter_of(kind)
    for call in (
        lambda: lora_jax.multi.combine([(layout, adapters)], [1.0]),
        lambda: lora_jax.multi.truncate(Adapter(layout, adapters), 1),
        lambda: lora_jax.as_lora(layout, adapters),
    ):
        with pytest.raises(LoraError, match=f"an update of the kind '{kind}'"):
            call()


@pytest.mark.few(3)
@pytest.mark.matrix
@cells("analysis")
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_analysis_is_of_the_merged_difference(kind: str, scheme: str | None) -> None:
    layout, adapters = adapter_of(kind)
    params, whole = (PARAMS, PARAMS) if scheme is None else int8_base()
    base = lora_jax.paths.flatten(whole)
    merged = lora_jax.paths.flatten(merge(layout, params, adapters))
    spectra = analysis.spectrum(layout, adapters, params)
    amplified = analysis.amplification(layout, params, adapters)
    own = analysis.similarity(Adapter(layout, adapters), Adapter(layout, adapters), "input", params)
    for t in layout.targets:
        d = np.asarray(merged[t.path], np.float64) - np.asarray(base[t.path], np.float64)
        values = np.linalg.svd(d, compute_uv=False)
        got = spectra[t.path].values
        k = min(got.shape[-1], values.shape[-1])
        np.testing.assert_allclose(got[..., :k], values[..., :k], rtol=1e-4, atol=1e-5)
        assert (np.abs(got[..., k:]) < 1e-5).all() and (values[..., k:] < 1e-4).all()
        norm = np.linalg.norm(d, axis=(-2, -1))
        np.testing.assert_allclose(amplified[t.path].update, norm, rtol=1e-4)
        np.testing.assert_allclose(own[t.path][..., 0, 0], 1, atol=1e-6)
    assert analysis.similarity(Adapter(layout, adapters), Adapter(layout, adapters), "a")


def test_analysis_asks_for_the_parameters_of_dora() -> None:
    layout, adapters = adapter_of("dora")
    with pytest.raises(LoraError, match=r"rescales W itself.*with params="):
        analysis.spectrum(layout, adapters)
    bias, shifts = adapter_of("bias")
    with pytest.raises(LoraError, match="'bias' has no factors"):
        analysis.spectrum(bias, shifts)


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base(kind: str) -> None:
    layout, adapters = adapter_of(kind)
    loss = lambda ad, params: weighted(adapted(layout, params, ad, X))  # noqa: E731
    both = jax.jit(jax.value_and_grad(loss))
    q, floats = int8_base()
    assert_close(both(adapters, q), both(adapters, floats))


@cells("init_from_base", refused=True)
def test_what_cannot_begin_with_a_part_of_w(kind: str) -> None:
    name = "lora" if kind == "parts" else kind
    with pytest.raises(LoraError, match=re.escape(f"an update of the kind '{name}'")):
        lora_jax.init_from_base(layout_of(kind), PARAMS)


@cells("init_from_base")
def test_init_from_base(kind: str) -> None:
    """The first output is the base's; more laws are in tests/beginnings/test_from_base.py."""
    layout = layout_of(kind)
    start = lora_jax.init_from_base(layout, PARAMS)
    assert_close(adapted(layout, start.params, start.adapters, X), bare(PARAMS, X))


@cells("init_from_inputs")
def test_init_from_inputs(kind: str) -> None:
    layout = layout_of(kind)
    key = jax.random.key(0)
    adapters = lora_jax.init_from_inputs(key, layout, model, PARAMS, [(X,)])
    assert_close(adapted(layout, PARAMS, adapters, X), bare(PARAMS, X))
    other = lora_jax.init(key, layout, params=PARAMS)
    same = [
        np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (adapters, other)), strict=True)
    ]
    assert all(same) == (kind == "bias")


@cells("init_from_inputs", refused=True)
def test_what_has_no_factor_of_the_inputs(kind: str) -> None:
    with pytest.raises(LoraError, match=f"kind '{kind}' has no factor `a`"):
        lora_jax.init_from_inputs(jax.random.key(0), layout_of(kind), model, PARAMS, [(X,)])
