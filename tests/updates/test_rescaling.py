"""Kinds that only multiply W, (IA)3 and OFT: their formula in float64, and what they refuse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Layout, LoraError, LoraSpec, Rule, Target
from lora_jax.multi import stack
from lora_jax.updates import kind_of
from tests.cases import normal
from tests.programs import compiled
from tests.updates import forms
from tests.updates.forms import arrays, in_order, name_of, weight
from tests.updates.test_kinds import close

TARGETS = [t for t in forms.TARGETS if t.kind in forms.RESCALING]


def definition(target: Target, parameters: Any, w: Any) -> np.ndarray:
    """W' in float64 and W's order, slice by slice as [in, out] matrices."""
    stack, sizes = target.sizes(target.stack), (target.fan_in, target.fan_out)
    order = (*target.stack, *target.inputs, *target.outputs)
    flat = np.transpose(np.asarray(w, np.float64), order)
    whole = flat.reshape(-1, *sizes)
    (own,) = (np.asarray(x, np.float64).reshape(len(whole), -1) for x in parameters)
    found = [_slice(target, one, x) for one, x in zip(whole, own, strict=True)]
    inputs, outputs = target.sizes(target.inputs), target.sizes(target.outputs)
    return in_order(target, np.stack(found).reshape(*stack, *inputs, *outputs))


def _slice(target: Target, w: np.ndarray, own: np.ndarray) -> np.ndarray:
    if not target.kind.startswith("oft"):
        return w * own if target.kind == "ia3" else own[:, None] * w
    out = np.zeros((target.fan_in, target.fan_in))
    for k, above in enumerate(own.reshape(target.fan_in // target.rank, -1)):
        s, i = np.zeros((target.rank, target.rank)), slice(k * target.rank, (k + 1) * target.rank)
        s[np.triu_indices(target.rank, 1)] = above
        s, one = s - s.T, np.eye(target.rank)
        series = one + 2 * s + 2 * s @ s + 2 * s @ s @ s + s @ s @ s @ s
        out[i, i] = series if target.kind == "oft" else (one - s) @ np.linalg.inv(one + s)
    return out @ w


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_merge_is_the_formula(target: Target) -> None:
    kind, w = kind_of(target), weight(target)
    parameters = jax.tree.map(lambda x: 0.5 * x, arrays(target))
    got = compiled(lambda p, w: kind.merged(target, p, w), parameters, w)
    close(got, definition(target, parameters, w))
    assert kind.rescales and kind.factors(target, parameters).a.shape[-1] == 0


def test_a_rotation_keeps_the_lengths_of_outputs() -> None:
    target = Target("w", (12, 5), (), (0,), (1,), 4, 1.0, kind="oft_cayley")
    w = weight(target)
    merged = kind_of(target).merged(target, arrays(target), w)
    np.testing.assert_allclose(np.linalg.norm(merged, axis=0), np.linalg.norm(w, axis=0), rtol=1e-5)
    series = forms.as_kind(target, "oft")
    small = jax.tree.map(lambda x: 0.05 * x, arrays(series))
    there = kind_of(series).merged(series, small, w)
    back = kind_of(target).merged(target, jax.tree.map(jnp.negative, small), w)
    np.testing.assert_allclose(there, back, atol=1e-3)  # S^4, and PEFT's other sign
    assert np.abs(np.asarray(there - w)).max() > 0.1


def test_a_block_that_does_not_divide_is_named_with_the_nearest() -> None:
    with pytest.raises(LoraError, match=r"divides the 9 inputs.*got 2.*Rule\('w', rank=3\)"):
        Layout((Target("w", (9, 8), (), (0,), (1,), 2, 1.0, kind="oft"),))


PROGRAMS = {
    "slices, shards or rearranges": lambda p, x: x[:, :4] @ p["w"][::2],
    "shards": lambda p, x: x @ p["w"][::-1],
    "a lookup": lambda p, x: p["w"][jnp.argmax(x, 1)],
    "over a part of the inputs": lambda p, x: jnp.einsum("bi,ij->bij", x, p["w"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_rotation_that_cannot_follow_is_refused(name: str) -> None:
    f, params, x = PROGRAMS[name], {"w": normal(0, 8, 6)}, normal(1, 3, 8)
    spec = LoraSpec(2, targets=Rule("w", kind="oft", inputs=0, outputs=1))
    layout = lora_jax.resolve(spec, f, params, x)
    with pytest.raises(LoraError, match=rf"(?s){name}.*OFT.*another kind"):
        lora_jax.adapt(layout, f)(params, lora_jax.init(jax.random.key(0), layout), x)


def test_inputs_may_be_split_and_put_together() -> None:
    """Heads: W [8, 6] is used as [2, 4, 6], and W [2, 4, 6] as [8, 6]."""

    def f(p: Any, x: Any) -> Any:
        split = jnp.einsum("bhd,hdo->bo", x.reshape(3, 2, 4), p["w"].reshape(2, 4, 6))
        return split + x @ p["heads"].reshape(8, 6)

    params, x = {"w": normal(0, 8, 6), "heads": normal(1, 2, 4, 6)}, normal(2, 3, 8)
    layout = lora_jax.resolve(LoraSpec(2, targets="*", kind="oft"), f, params, x)
    adapters = {t.path: arrays(t, 3) for t in layout.targets}
    got = lora_jax.adapt(layout, f)(params, adapters, x)
    np.testing.assert_allclose(
        got, f(lora_jax.merge(layout, params, adapters), x), rtol=1e-4, atol=1e-4
    )


def test_a_stack_of_rotations_has_one_rank() -> None:
    def adapter(rank: int) -> Any:
        layout = Layout((Target("w", (12, 5), (), (0,), (1,), rank, 1.0, kind="oft"),))
        return layout, lora_jax.init(jax.random.key(0), layout)

    with pytest.raises(LoraError, match=r"'w' has rank 4 in adapter 1, and 3 .*'oft' has one rank"):
        stack([adapter(3), adapter(4)])
