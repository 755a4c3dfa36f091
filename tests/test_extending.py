"""A base, a kind of update and a rule for a kernel that a user writes without editing the package.

They come from docs/extending.md, and its code runs here.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core
from jax.interpreters import ad, mlir

import lora_jax
from lora_jax.primitives import kernel, table
from lora_jax.updates import kind as kinds
from lora_jax.updates import register
from tests import cases, laws
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


@pytest.mark.parametrize("kind", ["lora", "gained", "dora"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_base_and_a_kind_from_outside(name: str, kind: str) -> None:
    """A base and a kind of update from outside the package follow the law."""
    law = Law(cases.REGISTRY[name](), kind)
    to_ternary(law)
    assert_law(law)


@pytest.mark.parametrize("base", [None, "ternary", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "gained", "dora"])
def test_a_kernel_with_a_gradient_rule_of_its_own(kind: str, base: str | None) -> None:
    """A kernel with a gradient rule of its own follows the law once its rule is registered."""
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
    """A registered rule for a primitive is found by `resolve` and by "all-linear"."""

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
