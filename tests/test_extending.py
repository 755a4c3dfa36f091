"""A base, kinds of update and rules that a user writes without editing the package.

Some come from docs/extending.md, whose code runs here, and some from the module tests/extension.py,
which goes through every public function.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.interpreters import ad, mlir
from jax.sharding import PartitionSpec

import lora_jax
from lora_jax import Factors, LoraError, LoraSpec, Rule, analysis
from lora_jax.exchange import peft
from lora_jax.models.hf_module import HfModule
from lora_jax.multi import moe
from lora_jax.primitives import kernel, table
from lora_jax.updates import kind as kinds
from lora_jax.updates import register
from tests import cases, extension, laws
from tests.docs import pages
from tests.test_bases_and_kinds import assert_near
from tests.test_transform import Law

PAGE = pages.run("extending")
Ternary, ternary = PAGE["Ternary"], PAGE["ternary"]
Gained, my_gmm, gmm_rule = PAGE["Gained"], PAGE["my_gmm"], PAGE["gmm_rule"]

pytestmark = pytest.mark.standard_promotion
PROGRAMS = [
    *("bare_matmul", "bare_scan", "bare_transposed_left", "bare_ragged_dot", "bare_used_both_ways"),
    *("bare_einsum_scrambled", "linen_conv_2d_strided", "linen_scan"),
]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Register the user's kind and rule, and restore the tables after the test."""
    register(Gained())
    table.register(gmm_rule, function="my_gmm")
    yield
    del kinds._KINDS["gained"]
    del table.PRIMITIVES["custom_vjp_call my_gmm"]


def to_ternary(law: Law) -> None:
    leaves = lora_jax.paths.flatten(law.case.params)
    law.base_params = lora_jax.paths.replace(
        law.case.params,
        {
            t.path: ternary(leaves[t.path], t.sizes(t.stack))
            for t in law.layout.targets
            if t.stack == tuple(range(len(t.stack)))
        },
    )
    assert any(isinstance(w, Ternary) for w in lora_jax.paths.flatten(law.base_params).values())


@functools.cache
def gmm_case() -> cases.Case:
    def f(p: Any, x: Any, sizes: Any) -> Any:
        return my_gmm(jnp.tanh(x @ p["first"]), p["experts"], sizes)

    params = {"first": cases.normal(0, 10, 10), "experts": cases.normal(1, 4, 10, 14)}
    args = (cases.normal(2, 9, 10), jnp.array([4, 0, 3, 2]))
    return cases.Case("my_gmm", f, params, args, ("first", "experts"), batched=False)


def assert_law(law: Law) -> None:
    for got, want in zip(law.got, law.want, strict=True):
        assert_near(got, want)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["lora", "gained", "dora"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_base_and_a_kind_from_outside(name: str, kind: str) -> None:
    law = Law(cases.REGISTRY[name](), kind)
    to_ternary(law)
    assert_law(law)


@pytest.mark.few(4)
@pytest.mark.parametrize("base", [None, "ternary", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "gained", "dora"])
def test_a_kernel_with_a_gradient_rule_of_its_own(kind: str, base: str | None) -> None:
    law = Law(gmm_case(), kind, "nf4" if base == "nf4" else None)
    assert [t.stack for t in law.layout.targets] == [(0,), ()]
    if base == "ternary":
        to_ternary(law)
    assert_law(law)


def test_all_linear_takes_the_kernel_too() -> None:
    case = gmm_case()
    with_head = lambda p, *args: case.f(p, *args) @ p["head"]  # noqa: E731
    params = {**case.params, "head": cases.normal(3, 14, 3)}
    layout = lora_jax.resolve(lora_jax.LoraSpec(2), with_head, params, *case.args)
    assert {t.path for t in layout.targets} == {"first", "experts"}


def test_an_adapter_of_the_kind_is_saved_and_restored(tmp_path: pathlib.Path) -> None:
    law = Law(cases.REGISTRY["bare_matmul"](), "gained")
    lora_jax.save(tmp_path / "adapter", (law.layout, law.adapters))
    back = lora_jax.restore(tmp_path / "adapter")
    assert back.layout == law.layout
    jax.tree.map(lambda x, y: (x == y).all() or pytest.fail("differs"), back[1], law.adapters)


# --- a primitive of the user's own --------------------------------------------------------------

own_product = core.Primitive("own_product")  # x [.., in], w [in, out]
own_product.def_abstract_eval(
    lambda x, w: jax.core.ShapedArray((*x.shape[:-1], w.shape[1]), x.dtype)
)
mlir.register_lowering(own_product, mlir.lower_fun(lambda x, w: x @ w, multiple_results=False))
ad.defbilinear(
    own_product,
    lambda ct, x, w: ct @ w.T,
    lambda ct, x, w: jnp.tensordot(x, ct, (list(range(x.ndim - 1)), list(range(ct.ndim - 1)))),
)


def test_a_primitive_of_the_users_own() -> None:
    def f(p: Any, x: Any) -> Any:
        return jnp.tanh(own_product.bind(jnp.tanh(x @ p["first"]), p["own"])) @ p["head"]

    params = {"first": cases.normal(0, 6, 8), "own": cases.normal(1, 8, 7)}
    params["head"] = cases.normal(2, 7, 3)
    x = cases.normal(3, 4, 6)
    rule = kernel.product(own_product.bind, x=0, weight=1, stack=(), inputs=0, outputs=1)
    table.register(rule, primitive="own_product")
    try:
        layout = lora_jax.resolve(lora_jax.LoraSpec(2), f, params, x)
        assert [t.path for t in layout.targets] == ["first", "own"]
        assert (layout["own"].inputs, layout["own"].outputs) == ((0,), (1,))
        laws.assert_adapt_equals_merge(layout, f, params, x)
    finally:
        del table.PRIMITIVES["own_product"]


# The walk of tests/extension.py: every function of the package, over what it has never heard of.

PARAMS = {
    "first": cases.normal(0, 8, 8),
    "bias": cases.normal(1, 8),
    "layers": cases.normal(2, 3, 8, 8),
    "bank": cases.normal(3, 2, 8, 6),
    "head": cases.normal(4, 6, 5),
}
X = cases.normal(5, 4, 8)
RULES = (Rule("bias", kind="vector"), Rule("layers", kind="rescaled"), "all-linear")
MATRICES = ("first", "layers", "bank")


def model(p: Any, x: Any) -> Any:
    h = jnp.tanh(x @ p["first"] + p["bias"][None])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["layers"])
    return extension.banked(jnp.stack([h, 2 * h]), p["bank"]).sum(0) @ p["head"]


@pytest.fixture
def walked() -> Iterator[lora_jax.Layout]:
    """The layout of the model, with everything of the module registered."""
    mine = (extension.Vector(), extension.Scaled(), extension.Rescaled())
    for kind in mine:
        register(kind)
    table.register(extension.bank_rule, primitive="my_bank")
    yield lora_jax.resolve(LoraSpec(2, targets=RULES, kind="scaled"), model, PARAMS, X)
    for kind in mine:
        del kinds._KINDS[kind.name]
    del table.PRIMITIVES["my_bank"]


def drawn(layout: lora_jax.Layout, seed: int = 3) -> Any:
    draw = np.random.default_rng(seed).standard_normal
    shapes = jax.eval_shape(lambda: lora_jax.init(jax.random.key(0), layout, params=PARAMS))
    return jax.tree.map(lambda x: (0.2 * draw(x.shape)).astype(np.float32), shapes)


def merged(layout: lora_jax.Layout, adapters: Any, params: Any = PARAMS) -> Any:
    return model(lora_jax.merge(layout, params, adapters), X)


def assert_close(got: Any, want: Any, **how: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5, **how)


def test_resolve_and_all_linear(walked: lora_jax.Layout) -> None:
    roles = {t.path: (t.kind, t.stack, t.inputs, t.outputs) for t in walked.targets}
    assert roles == {
        "bank": ("scaled", (0,), (1,), (2,)),
        "bias": ("vector", (), (), (0,)),
        "first": ("scaled", (), (0,), (1,)),
        "layers": ("rescaled", (0,), (1,), (2,)),
    }
    assert [x.path for x in walked.left_out] == ["head"]
    fresh = lora_jax.init(jax.random.key(0), walked, params=PARAMS)
    assert_close(lora_jax.adapt(walked, model)(PARAMS, fresh, X), model(PARAMS, X))


@pytest.mark.parametrize("base", [None, "halves", "nf4"])
def test_adapt_is_merge(walked: lora_jax.Layout, base: str | None) -> None:
    """In outputs and in gradients, over floats, a base of its own and codes of the package's."""
    params, adapters = PARAMS, drawn(walked)
    if base == "nf4":
        params = lora_jax.quantize(PARAMS, "nf4", walked.subset(*MATRICES), block=32)
    if base == "halves":
        params = {
            **PARAMS,
            **{p: extension.halves(PARAMS[p], len(walked[p].stack)) for p in MATRICES},
        }
    g = lora_jax.adapt(walked, model)

    def loss(run: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda ad: (run(ad) ** 2).sum()))(adapters)

    got, want = loss(lambda ad: g(params, ad, X)), loss(lambda ad: merged(walked, ad, params))
    jax.tree.map(assert_close, got, want)


def test_stack_select_and_dropout(walked: lora_jax.Layout) -> None:
    one = walked.subset(*MATRICES)
    members = [(one, drawn(one, seed)) for seed in (3, 4)]
    layout, stacked = lora_jax.multi.stack(members)
    g = lora_jax.adapt(layout, model)
    got = jax.jit(lambda ids: g(PARAMS, lora_jax.multi.select(stacked, ids), X))(
        jnp.array([0, 1, lora_jax.multi.BASE, 1])
    )
    every = [*(merged(one, adapters) for _, adapters in members), model(PARAMS, X)]
    assert_close(got, jnp.stack([every[i][row] for row, i in enumerate((0, 1, 2, 1))]))
    both = lora_jax.dropout(lora_jax.multi.select(stacked, 1), jax.random.key(0), 0.5)
    alone = lora_jax.dropout(members[1][1], jax.random.key(0), 0.5)
    dropped = lora_jax.adapt(one, model)(PARAMS, alone, X)
    assert_close(g(PARAMS, both, X), dropped)
    assert float(jnp.abs(dropped - every[1]).max()) > 1e-3
    with pytest.raises(LoraError, match=r"'bias'.*'vector' has no factors"):
        lora_jax.multi.stack([(walked, drawn(walked))])


def test_mix_and_route(walked: lora_jax.Layout) -> None:
    one = walked.subset("first", "bank")
    layout, stacked = lora_jax.multi.stack([(one, drawn(one, seed)) for seed in (3, 4)])
    g = lora_jax.adapt(layout, model)
    router = jax.tree.map(jnp.zeros_like, moe.init_router(jax.random.key(0), layout, 2))
    got, want = moe.route(stacked, router), moe.mix(stacked, [0.5, 0.5])
    assert_close(g(PARAMS, got, X), g(PARAMS, want, X))


def test_export_save_and_restore(walked: lora_jax.Layout, tmp_path: pathlib.Path) -> None:
    adapters = drawn(walked)
    lora_jax.save(tmp_path / "own", (walked, adapters))
    back = lora_jax.restore(tmp_path / "own")
    assert back.layout == walked
    jax.tree.map(np.testing.assert_array_equal, back.parameters, adapters)
    exact = walked.subset("first", "bank")
    plain, factors, _ = lora_jax.as_lora(exact, {t.path: adapters[t.path] for t in exact.targets})
    assert {t.kind for t in plain.targets} == {"lora"}
    assert_close(merged(plain, factors), merged(exact, {p: adapters[p] for p in factors}))
    with pytest.raises(LoraError, match=r"'layers'.*'rescaled' rescales W itself.*merge"):
        lora_jax.as_lora(walked.subset("layers"), {"layers": adapters["layers"]})
    names = {"first": HfModule("fc.weight", layer="linear"), "bias": HfModule("fc.bias")}
    f = lambda p, x: x @ p["first"] + p["bias"][None]  # noqa: E731
    params = {name: PARAMS[name] for name in names}
    two = lora_jax.resolve(
        LoraSpec(2, targets=("first", Rule("bias", kind="vector")), kind="scaled"), f, params, X
    )
    parts = {name: adapters[name] for name in names}
    peft.save(tmp_path / "peft", names, (two, parts), base="mine", params=params)
    read = peft.load(tmp_path / "peft", names, f, params, X)
    restored = lora_jax.paths.replace(params, read.trainable)
    got = f(lora_jax.merge(read.layout, restored, read.parameters), X)
    assert_close(got, f(lora_jax.merge(two, params, parts), X))


def test_sharding_and_analysis(walked: lora_jax.Layout) -> None:
    specs = {path: PartitionSpec() for path in PARAMS} | {"layers": PartitionSpec(None, "fsdp")}
    placed = lora_jax.partition_specs(walked, specs)
    assert placed["layers"].gain == PartitionSpec(None, "fsdp")
    exact = walked.subset(*MATRICES)
    adapters = {path: x for path, x in drawn(walked).items() if path != "bias"}
    spectra = analysis.spectrum(exact, adapters, PARAMS)
    delta = lora_jax.merge(exact, PARAMS, adapters)["layers"] - PARAMS["layers"]
    assert_close(spectra["layers"].values, np.linalg.svd(delta, compute_uv=False))


# Concatenated weights, each with an update of its own, keep it under dropout and under a router.


def concatenated(axis: int) -> tuple[Any, Any, dict[str, Any], Any]:
    """Two functions that compute the same, with q and k in one product and in two; params and x."""
    params = {"q": cases.normal(0, 8, 8), "k": cases.normal(1, 8, 8)}
    x = cases.normal(2, 5, 8 * (2 - axis))

    def fused(p: Any, x: Any) -> Any:
        return x @ jnp.concatenate([p["q"], p["k"]], axis)

    def apart(p: Any, x: Any) -> Any:
        if axis:
            return jnp.concatenate([x @ p["q"], x @ p["k"]], 1)
        return x[:, :8] @ p["q"] + x[:, 8:] @ p["k"]

    return fused, apart, params, x


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_concatenation_under_dropout(kind: str, axis: int) -> None:
    """Along the outputs both have one mask of x; along the inputs each weight has its own."""
    fused, apart, params, x = concatenated(axis)
    layout = lora_jax.resolve(LoraSpec(2, kind=kind, targets="*"), apart, params, x)
    adapters = drawn_of(layout, 0, params)
    if kind == "dora" and not axis:
        with pytest.raises(LoraError, match="concatenate"):
            lora_jax.adapt(layout, fused)(params, adapters, x)
        return

    def dropped(layout: lora_jax.Layout, f: Any, params: Any, adapters: Any) -> Any:
        under = lora_jax.dropout(adapters, jax.random.key(1), 0.5)
        return lora_jax.adapt(layout, f)(params, under, x)

    got = dropped(layout, fused, params, adapters)
    if axis:
        assert_close(got, dropped(layout, apart, params, adapters))
        return
    # With W = 0, and identities for the factors of one weight, the output is its part of drop(x).
    square = lora_jax.Layout(
        tuple(dataclasses.replace(t, rank=8, alpha=8.0) for t in layout.targets)
    )
    none, eye = jnp.zeros((8, 8)), jnp.eye(8)
    want = apart(params, x)
    for name, part in (("q", x[:, :8]), ("k", x[:, 8:])):
        one = {n: Factors(eye, eye if n == name else none) for n in params}
        mine = dropped(square, fused, {"q": none, "k": none}, one)
        assert 0 < np.count_nonzero(mine) < mine.size
        np.testing.assert_array_equal(mine, jnp.where(mine != 0, 2 * part, 0))
        want += layout[name].scale * mine @ adapters[name].a @ adapters[name].b
    assert_close(got, want)


@pytest.mark.parametrize("axis", [0, 1])
def test_concatenation_under_route(axis: int) -> None:
    fused, apart, params, x = concatenated(axis)
    layout = lora_jax.resolve(LoraSpec(2, targets="*"), apart, params, x)
    members = [(layout, jax.tree.map(lambda x: 0.1 * x, drawn_of(layout, s))) for s in (0, 1)]
    layout, stacked = lora_jax.multi.stack(members)
    router = moe.init_router(jax.random.key(0), layout, 2)
    got, want = (
        lora_jax.adapt(layout, f)(params, moe.route(stacked, router), x) for f in (fused, apart)
    )
    assert_close(got, want)


def drawn_of(layout: lora_jax.Layout, seed: int, params: Any = None) -> Any:
    draw = np.random.default_rng(seed).standard_normal
    shapes = jax.eval_shape(lambda: lora_jax.init(jax.random.key(0), layout, params=params))
    return jax.tree.map(lambda x: draw(x.shape).astype(np.float32), shapes)


def test_no_kind_is_tested_by_name() -> None:
    names = {*kinds._KINDS}
    found = []
    for path in pathlib.Path(lora_jax.__file__).parent.rglob("*.py"):
        if "updates" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                parts = [x for part in (node.left, *node.comparators) for x in ast.walk(part)]
                kind = any(isinstance(x, ast.Attribute) and x.attr == "kind" for x in parts)
                if kind and names & {x.value for x in parts if isinstance(x, ast.Constant)}:
                    found.append(f"{path}:{node.lineno}")
    assert not found
