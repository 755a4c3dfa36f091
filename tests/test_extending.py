"""A base, a kind of update and a rule for a kernel, written by a user: no edit in the package.

docs/extending.md explains the parts between the marks, word for word.
"""

# ruff: noqa: E402, I001 (each part has its own imports, as a user's file would)
from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterator

import pytest

# [base]
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from lora_jax.base import Base


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ternary(Base):
    """A weight of -1, 0 and 1, times one scale for each slice of its stack."""

    codes: Any  # int8 [*stack, *slice]
    scale: Any  # float32 [*stack]
    slice_ndim: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> Any:
        return self.scale.dtype

    def dense(self) -> Any:
        scale = jnp.expand_dims(self.scale, range(-self.slice_ndim, 0))
        return self.codes.astype(self.dtype) * scale


def ternary(w: Any, stack: tuple[int, ...] = ()) -> Ternary:
    """W by the sign of its large entries; the stack axes come first."""
    axes = tuple(range(len(stack), w.ndim))
    scale = jnp.abs(w).mean(axes)
    codes = jnp.round(w / jnp.expand_dims(scale, axes)).clip(-1, 1).astype(jnp.int8)
    return Ternary(codes, scale, len(axes))


# [update]
from typing import NamedTuple

from lora_jax.updates import Factors, Kind, register


class GainedFactors(NamedTuple):
    """a [*stack, *inputs, rank], b [*stack, rank, *outputs], gain [*stack, *outputs]."""

    a: Any
    b: Any
    gain: Any


class Gained(Kind):
    """`W + scale * (a @ b) * gain`, with a learned gain for each output of the update."""

    name = "gained"
    fields = GainedFactors

    def axes(self, target: Any) -> GainedFactors:
        stack, inputs, outputs = target.stack, target.inputs, target.outputs
        return GainedFactors((*stack, *inputs, None), (*stack, None, *outputs), (*stack, *outputs))

    def init(self, key: Any, target: Any, dtype: Any, a_init: Any, w: Any = None) -> Any:
        shapes = self.shapes(target)
        a, b = a_init(key, target, dtype), jnp.zeros(shapes.b, dtype)
        return GainedFactors(a, b, jnp.ones(shapes.gain, dtype))

    def factors(self, target: Any, parameters: GainedFactors) -> Factors:
        gain = jnp.expand_dims(parameters.gain, len(target.stack))  # along the rank
        return Factors(parameters.a, parameters.b * gain)


# [kernel]
from lora_jax.primitives import kernel, table


@jax.custom_vjp
def my_gmm(rows: Any, bank: Any, sizes: Any) -> Any:
    """A grouped product as a kernel has it: rows in groups, bank [groups, in, out]."""
    return jax.lax.ragged_dot(rows, bank, sizes)


def _forward(rows: Any, bank: Any, sizes: Any) -> Any:
    return my_gmm(rows, bank, sizes), (rows, bank, sizes)


def _backward(kept: Any, dy: Any) -> Any:
    rows, bank, sizes = kept
    _, pull = jax.vjp(lambda rows, bank: jax.lax.ragged_dot(rows, bank, sizes), rows, bank)
    return *pull(dy), None


my_gmm.defvjp(_forward, _backward)

gmm_rule = kernel.product(
    my_gmm, x=0, weight=1, stack=(0,), inputs=1, outputs=2,
    rows=lambda array, x, sizes: jnp.repeat(array, sizes, 0, total_repeat_length=len(x)),
)  # fmt: skip
# [end]

from lora_jax.primitives import control
from lora_jax.updates import kind as kinds
from tests import cases
from tests.test_bases_and_kinds import assert_near
from tests.test_transform import Law

pytestmark = pytest.mark.standard_promotion
PROGRAMS = [
    *("bare_matmul", "bare_scan", "bare_transposed_left", "bare_ragged_dot", "bare_used_both_ways"),
    *("bare_einsum_scrambled", "linen_conv_2d_strided", "linen_scan"),
]


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The user's two registrations, and the tables as they were."""
    register(Gained())
    table.register(gmm_rule, function="my_gmm")
    yield
    del kinds._KINDS["gained"]
    del control.FUNCTIONS["my_gmm"]


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
    """Red: a base or a kind that some part of the evaluator asks for by its own type."""
    law = Law(cases.REGISTRY[name](), kind)
    to_ternary(law)
    assert_law(law)


@pytest.mark.parametrize("base", [None, "ternary", "nf4"])
@pytest.mark.parametrize("kind", ["lora", "gained", "dora"])
def test_a_kernel_with_a_gradient_rule_of_its_own(kind: str, base: str | None) -> None:
    """Red: `registered` without the rule of `my_gmm`."""
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


def test_the_page_shows_these_very_lines() -> None:
    """Red: a line of the page that this file does not have."""
    here = pathlib.Path(__file__).read_text()
    page = (pathlib.Path(__file__).parents[1] / "docs" / "extending.md").read_text()
    parts = dict(re.findall(r"# \[(\w+)\]\n(.*?)(?=# \[)", here, re.S))
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert [b.strip() for b in blocks] == [parts[k].strip() for k in ("base", "update", "kernel")]
