"""`combine` against a float64 sum written out by hand, and `truncate` against Eckart-Young."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Adapter, Factors, Layout, LoraError, LoraSpec, Target
from lora_jax.multi.combine import combine, truncate
from lora_jax.updates import Lora
from tests import cases, programs
from tests.test_transform import assert_close

# One of each kind of weight: (shape, stack, inputs, outputs).
FORMS = {
    "matrix": ((9, 7), (), (0,), (1,)),
    "stacked": ((3, 9, 7), (0,), (1,), (2,)),
    "heads": ((2, 9, 3, 4), (2,), (1,), (0, 3)),  # stack in the middle, outputs apart
    "kernel": ((3, 2, 5, 8), (), (0, 1, 2), (3,)),
}

delta = Lora().delta


def member(
    seed: int, rank: int, alpha: float, *names: str, dtype: Any = jnp.float32
) -> tuple[Layout, Any]:
    targets = tuple(Target(name, *FORMS[name], rank=rank, alpha=alpha) for name in names)
    draw = np.random.default_rng(seed).standard_normal
    drawn = {t.path: Factors(draw(t.a_shape), draw(t.b_shape)) for t in targets}
    # NumPy draws, because this runs when tests are collected and must compile nothing.
    return Layout(targets), jax.device_put(jax.tree.map(lambda x: x.astype(dtype), drawn))


MEMBERS = [
    member(0, 1, 3.0, "matrix", "stacked", "heads", "kernel"),
    member(1, 2, 1.0, "matrix", "heads"),
    member(2, 3, 16.0, "kernel", "matrix", "stacked"),
]
WEIGHTS = [0.7, -1.5, 0.25]


def by_hand(members: list[Any], weights: list[float], path: str) -> Any:
    """Sum the weighted updates in float64, slice by slice, in the order of W's axes."""
    shape, stack, inputs, outputs = FORMS[path]
    order = (*stack, *inputs, *outputs)
    total = np.zeros([shape[i] for i in order])
    flat = total.reshape(
        int(np.prod([shape[i] for i in stack])), int(np.prod([shape[i] for i in inputs])), -1
    )
    for (layout, adapters), weight in zip(members, weights, strict=True):
        for target in layout.targets:
            if target.path == path:
                a = np.asarray(adapters[path].a, np.float64).reshape(*flat.shape[:2], target.rank)
                b = np.asarray(adapters[path].b, np.float64).reshape(len(flat), target.rank, -1)
                for i in range(len(flat)):
                    flat[i] += weight * target.alpha / target.rank * a[i] @ b[i]
    return total.transpose(np.argsort(order))


def test_the_combination_is_the_weighted_sum_of_the_updates() -> None:
    layout, adapters, _ = combine(MEMBERS, WEIGHTS)
    assert {t.path: t.rank for t in layout.targets} == {
        "matrix": 6, "stacked": 4, "heads": 3, "kernel": 4,
    }  # fmt: skip
    for t in layout.targets:
        assert t.scale == 1
        want = by_hand(MEMBERS, WEIGHTS, t.path)
        got = delta(t, adapters[t.path])
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
        parts = [(w, x[t.path], ad[t.path]) for w, (x, ad) in zip(WEIGHTS, MEMBERS, strict=True)
                 if t.path in ad]  # fmt: skip
        assert_close(got, sum(w * delta(target, factors) for w, target, factors in parts))


def test_adding_the_factors_would_be_wrong() -> None:
    (layout, one), (_, two) = member(0, 2, 2.0, "matrix"), member(1, 2, 2.0, "matrix")
    want = by_hand([(layout, one), (layout, two)], [1.0, 1.0], "matrix")
    added = jax.tree.map(jnp.add, one, two)["matrix"]
    error = np.linalg.norm(np.asarray(added.a @ added.b) - want) / np.linalg.norm(want)
    assert error > 0.5


def test_ranks_that_add_up_to_more_than_the_matrix_has_are_kept_exactly() -> None:
    members = [member(i, 3, 3.0, "stacked", "heads") for i in range(5)]
    weights = [1.0, -0.5, 2.0, 0.3, 0.1]
    layout, adapters, _ = combine(members, weights)
    assert {t.path: t.rank for t in layout.targets} == {"stacked": 7, "heads": 8}
    for t in layout.targets:
        want = by_hand(members, weights, t.path)
        got = delta(t, adapters[t.path])
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * np.abs(want).max())


@pytest.mark.few(1)
@pytest.mark.parametrize(("members", "rank"), [(MEMBERS, 1), (MEMBERS, 3), (MEMBERS[2:], 2)])
def test_truncation_is_the_nearest_and_reports_what_it_cut(members: list[Any], rank: int) -> None:
    """Truncation is Eckart-Young on every slice, and reports the error that it makes."""
    alone, weights = len(members) == 1, WEIGHTS[: len(members)]
    layout, adapters, _ = Adapter(*members[0]) if alone else combine(members, weights)
    (smaller, kept, _), cuts = truncate(Adapter(layout, adapters), rank)
    for t in layout.targets:
        want = by_hand(members, [1.0] if alone else weights, t.path)
        order = (*t.stack, *t.inputs, *t.outputs)
        flat = want.transpose(order).reshape(-1, t.fan_in, t.fan_out)
        s = np.linalg.svd(flat, compute_uv=False)
        error = np.sqrt((s[:, rank:] ** 2).sum())
        got = delta(smaller[t.path], kept[t.path])
        scale = np.linalg.norm(want)
        assert abs(np.linalg.norm(np.asarray(got) - want) - error) < 2e-6 * scale
        assert abs(float(cuts[t.path].error) - error) < 2e-6 * scale
        assert abs(float(cuts[t.path].relative) - error / scale) < 2e-6
        assert smaller[t.path].rank == min(rank, t.rank)


def test_truncation_to_no_lower_rank_changes_nothing() -> None:
    layout, adapters = MEMBERS[2]
    (same, kept, _), cuts = truncate(Adapter(layout, adapters), 3)
    assert same == layout
    assert all(kept[p] is adapters[p] for p in adapters)
    assert all(cut == (0, 0) for cut in cuts.values())


@pytest.mark.parametrize("rank", [1, 2])
def test_a_shared_budget_keeps_the_largest_singular_values_of_all_targets(rank: int) -> None:
    """No choice of ranks with the same sum is nearer; the loss of each target is its distance."""
    layout = Layout(tuple(Target(n, (9, 7), (), (0,), (1,), 3, 3.0) for n in "abc"))
    draw = np.random.default_rng(0).standard_normal
    sizes = {"a": [0.3, 0.2, 0.1], "b": [9.0, 8.0, 7.0], "c": [6.0, 2.0, 1.0]}
    adapters, values = {}, {}
    for path, s in sizes.items():
        one, two = np.linalg.qr(draw((9, 3)))[0], np.linalg.qr(draw((7, 3)))[0]
        adapters[path], values[path] = Factors(jnp.asarray(one * s), jnp.asarray(two.T)), s
    (smaller, kept, _), cuts = truncate(Adapter(layout, adapters), rank, share=True)
    ranks = dict.fromkeys(sizes, 0) | {t.path: t.rank for t in smaller.targets}
    assert ranks == {"a": 0, "b": 3, "c": 0 if rank == 1 else 3}
    for path, s in sizes.items():
        left = float(np.linalg.norm(s[ranks[path] :]))
        np.testing.assert_allclose(cuts[path].error, left, atol=1e-5)
    assert set(kept) == {t.path for t in smaller.targets}


def test_a_stack_shares_by_the_mean_over_its_slices() -> None:
    """One more rank of a stack of 3 costs as much as three of a matrix."""
    layout, adapters = member(0, 2, 2.0, "matrix", "stacked")
    adapters["stacked"] = Factors(*(100 * x for x in adapters["stacked"]))
    (smaller, _, _), _ = truncate(Adapter(layout, adapters), 1, share=True)
    assert {t.path: t.rank for t in smaller.targets} == {"stacked": 1, "matrix": 1}


def test_truncation_of_fresh_adapters_is_zero() -> None:
    """Fresh adapters, whose b is 0 and which have no first direction, are truncated to zero."""
    layout, adapters = member(0, 4, 4.0, "matrix", "stacked")
    adapters = {p: Factors(f.a, 0 * f.b) for p, f in adapters.items()}
    (smaller, kept, _), cuts = truncate(Adapter(layout, adapters), 2)
    for t in smaller.targets:
        assert jnp.all(delta(t, kept[t.path]) == 0)
        assert cuts[t.path] == (0, 0)


def test_no_product_has_the_shape_of_the_weight() -> None:
    target = Target("w", (60, 50), (), (0,), (1,), rank=6, alpha=6.0)
    factors = Factors(jnp.ones((60, 6)), jnp.ones((6, 50)))
    layout = Layout((target,))
    jaxpr = jax.make_jaxpr(lambda ad: truncate(Adapter(layout, ad), 3)[0].parameters)(
        {"w": factors}
    )
    sizes = {v.aval.size for eqn in programs.equations(jaxpr) for v in eqn.outvars}
    assert max(sizes) <= 60 * 6


def test_bfloat16_members_are_combined_in_float32() -> None:
    low = member(0, 2, 2.0, "matrix", dtype=jnp.bfloat16)
    members, weights = [low, member(1, 2, 2.0, "matrix")], [1 / 3, 0.7]
    layout, adapters, _ = combine(members, weights)
    assert adapters["matrix"].a.dtype == adapters["matrix"].b.dtype == jnp.float32
    want = by_hand(members, weights, "matrix")
    np.testing.assert_allclose(delta(layout["matrix"], adapters["matrix"]), want, atol=1e-5)
    (_, kept, _), _ = truncate(Adapter(*low), 1)
    assert kept["matrix"].a.dtype == jnp.bfloat16


@pytest.mark.few(1)
@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", ["bare_scan", "linen_conv_grouped", "linen_embed_tied"])
def test_the_result_is_an_ordinary_adapter(name: str, tmp_path: Any) -> None:
    case = cases.REGISTRY[name]()
    members, weights = [], [0.5, -2.0]
    for rank in (1, 2):
        spec = LoraSpec(rank, 3.0, case.targets)
        layout = lora_jax.resolve(spec, case.f, case.params, *case.args, **case.kwargs)
        adapters = lora_jax.init(jax.random.key(rank), layout)
        members.append((layout, jax.tree.map(lambda x: x + jnp.cos(x) / 9, adapters)))
    layout, adapters, _ = combine(members, weights)
    merged = lora_jax.merge(layout, case.params, adapters)
    one_by_one = case.params
    for (member_layout, member_adapters), weight in zip(members, weights, strict=True):
        scaled = {p: Factors(f.a, weight * f.b) for p, f in member_adapters.items()}
        one_by_one = lora_jax.merge(member_layout, one_by_one, scaled)
    assert_close(merged, one_by_one)
    g = lora_jax.adapt(layout, case.f)
    got = jax.jit(lambda ad: g(case.params, ad, *case.args, **case.kwargs))(adapters)
    assert_close(got, jax.jit(lambda p: case.f(p, *case.args, **case.kwargs))(merged))
    lora_jax.save(tmp_path / "both", lora_jax.Adapter(layout, adapters))
    assert lora_jax.restore(tmp_path / "both")[0] == layout


def test_trainable_base_parameters_are_not_lost() -> None:
    layout, adapters = MEMBERS[0]
    with_head = Adapter(layout, adapters, {"head": jnp.ones(3)})
    for act, doing in (
        (lambda: combine([with_head], [1.0]), "combined"),
        (lambda: lora_jax.multi.stack([with_head]), "stacked"),
        (
            lambda: lora_jax.multi.put(*lora_jax.multi.stack([MEMBERS[0]]), 0, with_head),
            "put into a stack",
        ),
    ):
        with pytest.raises(LoraError, match=f"(?s)cannot be {doing}.*head.*paths.replace"):
            act()
    smaller, _ = truncate(with_head, 1)
    assert smaller.trainable is with_head.trainable


def test_errors_name_the_path_and_the_cure() -> None:
    layout, adapters = MEMBERS[0]
    with pytest.raises(LoraError, match="nothing to combine"):
        combine([], [])
    with pytest.raises(LoraError, match="got 1 adapters and 2 weights"):
        combine([(layout, adapters)], [1.0, 2.0])
    with pytest.raises(LoraError, match="finite numbers, got \\[nan\\]"):
        combine([(layout, adapters)], [float("nan")])
    with pytest.raises(LoraError, match="no factors for it"):
        combine([(layout, {})], [1.0])
    other = Target("matrix", (7, 9), (), (0,), (1,), rank=1, alpha=1.0)
    strange = {"matrix": Factors(jnp.ones((7, 1)), jnp.ones((1, 9)))}
    with pytest.raises(LoraError, match="'matrix' is not the same parameter in all adapters"):
        combine([(layout, adapters), (Layout((other,)), strange)], [1.0, 1.0])
    with pytest.raises(LoraError, match="truncate: rank must be an integer"):
        truncate(Adapter(layout, adapters), 0)
