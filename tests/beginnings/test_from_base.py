"""PiSSA, OLoRA and LoftQ: the first output is the base's, or as near to it as they promise."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Layout, LoraError, Target
from lora_jax.updates import kind_of
from tests import cases
from tests.updates import forms
from tests.updates.forms import slices, weight

WIDE = Target("w", (2, 128, 48), (0,), (1,), (2,), rank=4, alpha=2.0)
SCHEMES = ["nf4", "int8", "int4"]


def targets(kind: str = "lora") -> Layout:
    return Layout(
        tuple(Target(name, *form, 2, 3.0, kind=kind) for name, form in forms.FORMS.items())
    )


def weights(layout: Layout, dtype: Any = jnp.float32) -> dict[str, Any]:
    return {t.path: weight(t, dtype=dtype) for t in layout.targets}


def matrices_of(target: Target, array: Any) -> np.ndarray:
    """W as [S, in, out] in float64."""
    order = (*target.stack, *target.inputs, *target.outputs)
    return np.asarray(array, np.float64).transpose(order).reshape(-1, target.fan_in, target.fan_out)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_the_first_step_is_the_base(method: Any, kind: str) -> None:
    layout = targets(kind)
    params = weights(layout)
    start = lora_jax.init_from_base(layout, params, method)
    merged = lora_jax.merge(layout, start.params, start.adapters)
    for t in layout.targets:
        w = params[t.path]
        np.testing.assert_allclose(merged[t.path], w, atol=2e-6)
        assert start.params[t.path].dtype == w.dtype
        assert float(jnp.abs(start.params[t.path] - w).max()) > 0.1
        assert start.errors[t.path].start < 1e-6 and start.errors[t.path].plain == 0


def test_pissa_holds_the_largest_singular_values() -> None:
    layout = targets()
    params = weights(layout)
    start = lora_jax.init_from_base(layout, params, "pissa")
    for t in layout.targets:
        a = slices(t, start.adapters[t.path].a, len(t.inputs), 1)
        b = slices(t, start.adapters[t.path].b, 1, len(t.outputs))
        for d, w in zip(t.scale * a @ b, matrices_of(t, params[t.path]), strict=True):
            u, s, vt = np.linalg.svd(w)
            np.testing.assert_allclose(d, u[:, : t.rank] * s[: t.rank] @ vt[: t.rank], atol=1e-5)
        np.testing.assert_allclose(  # each singular value is shared evenly
            np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=2), rtol=1e-5
        )


def test_olora_is_the_qr_of_the_torch_weight() -> None:
    layout = targets()
    params = weights(layout)
    start = lora_jax.init_from_base(layout, params, "olora")
    for t in layout.targets:
        a = slices(t, start.adapters[t.path].a, len(t.inputs), 1)
        b = slices(t, start.adapters[t.path].b, 1, len(t.outputs))
        for i, w in enumerate(matrices_of(t, params[t.path])):
            q, r = np.linalg.qr(w.T)
            np.testing.assert_allclose(b[i], q[:, : t.rank].T, atol=1e-6)
            np.testing.assert_allclose(a[i], r[: t.rank].T, atol=1e-5)


def test_a_bfloat16_base_loses_its_rounding_alone() -> None:
    layout = targets()
    params = weights(layout, jnp.bfloat16)
    start = lora_jax.init_from_base(layout, params)
    for t in layout.targets:
        assert start.params[t.path].dtype == jnp.bfloat16
        assert start.adapters[t.path].a.dtype == jnp.float32
        merged = lora_jax.merge(layout, start.params, start.adapters)[t.path]
        np.testing.assert_allclose(
            merged.astype(jnp.float32), params[t.path].astype(jnp.float32), atol=0.02
        )
        assert 0 < start.errors[t.path].start < 4e-3


@pytest.mark.few(2)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_loftq_is_nearer_than_quantising_alone(scheme: str, scaling: str) -> None:
    layout = Layout((dataclasses.replace(WIDE, scaling=scaling),))
    params = {"w": weight(WIDE), "bias": jnp.ones(3)}
    q = lora_jax.quantize(params, scheme, layout)
    start = lora_jax.init_from_base(layout, params, "loftq", quantised=q)
    merged = lora_jax.merge(layout, start.params, start.adapters)["w"]
    size = np.linalg.norm(params["w"])
    error = np.linalg.norm(merged - params["w"]) / size
    plain = np.linalg.norm(lora_jax.dequantize(q)["w"] - params["w"]) / size
    np.testing.assert_allclose(start.errors["w"], (error, plain), rtol=1e-4)
    assert error < 0.97 * plain
    assert jax.tree.structure(start.params) == jax.tree.structure(q)
    once = lora_jax.init_from_base(layout, params, "loftq", quantised=q, steps=1)
    assert start.errors["w"].start <= once.errors["w"].start < plain
    np.testing.assert_array_equal(once.params["w"].codes, q["w"].codes)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("double", [False, True])
def test_qpissa_quantises_the_residual(scheme: str, double: bool) -> None:
    """A residual has smaller numbers and loses less, if the spectrum falls as in real weights."""
    if double and scheme != "nf4":
        return
    layout = Layout((WIDE,))
    u, _, vt = np.linalg.svd(np.asarray(weight(WIDE)), full_matrices=False)
    falling = 10.0 / (1 + np.arange(48)) ** 1.5
    params = {"w": jnp.asarray((u * falling) @ vt, jnp.float32)}
    q = lora_jax.quantize(params, scheme, layout, double=double)
    start = lora_jax.init_from_base(layout, params, "pissa", quantised=q)
    assert start.errors["w"].start < 0.6 * start.errors["w"].plain
    assert jax.tree.structure(start.params) == jax.tree.structure(q)
    assert [x.dtype for x in jax.tree.leaves(start.params)] == [x.dtype for x in jax.tree.leaves(q)]
    again = lora_jax.init_from_base(layout, q, "pissa")  # W is the dequantised weight
    merged = lora_jax.merge(layout, again.params, again.adapters)["w"]
    w = lora_jax.dequantize(q)["w"]
    np.testing.assert_allclose(
        np.linalg.norm(merged - w) / np.linalg.norm(w), again.errors["w"].start, rtol=1e-4
    )
    assert again.errors["w"].plain == 0


def test_a_program_begins_as_its_base() -> None:
    case = cases.REGISTRY["bare_scan"]()
    spec = lora_jax.LoraSpec(2, 3.0, case.targets)
    layout = lora_jax.resolve(spec, case.f, case.params, *case.args)
    start = lora_jax.init_from_base(layout, case.params)
    g = lora_jax.adapt(layout, case.f)
    got, want = g(start.params, start.adapters, *case.args), case.f(case.params, *case.args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_what_was_learnt_moves_to_the_original_base() -> None:
    """The update that was learnt moves to the original base by the weights [1, -1]."""
    layout = Layout((WIDE,))
    params = {"w": weight(WIDE)}
    start = lora_jax.init_from_base(layout, params)
    learnt = jax.tree.map(lambda x: x + 0.1, start.adapters)
    both, moved, _ = lora_jax.multi.combine(
        [(layout, learnt), (layout, start.adapters)], [1.0, -1.0]
    )
    want = lora_jax.merge(layout, start.params, learnt)["w"]
    np.testing.assert_allclose(lora_jax.merge(both, params, moved)["w"], want, atol=1e-4)


def test_what_cannot_begin_so() -> None:
    layout, params = Layout((WIDE,)), {"w": weight(WIDE)}
    with pytest.raises(LoraError, match=r"no method 'pisa'; nearest: 'pissa'"):
        lora_jax.init_from_base(layout, params, "pisa")  # type: ignore[arg-type]
    with pytest.raises(LoraError, match=r"needs W in float and quantised"):
        lora_jax.init_from_base(layout, params, "loftq")
    for kind in ("vera", "loha", "lokr"):
        other = Layout((forms.as_kind(WIDE, kind),))
        with pytest.raises(LoraError, match=f"kind '{kind}' cannot begin"):
            lora_jax.init_from_base(other, params)
    parts = Layout((dataclasses.replace(WIDE, parts=((0, 8),)),))
    with pytest.raises(LoraError, match="kind 'lora' with parts cannot begin"):
        lora_jax.init_from_base(parts, params)
    still = Layout((dataclasses.replace(WIDE, alpha=0.0),))
    with pytest.raises(LoraError, match="alpha must be above 0"):
        lora_jax.init_from_base(still, params)


def test_dora_has_the_lengths_of_the_whole_weight() -> None:
    layout = Layout((forms.as_kind(WIDE, "dora"),))
    start = lora_jax.init_from_base(layout, {"w": weight(WIDE)})
    np.testing.assert_allclose(
        start.adapters["w"].magnitude, jnp.linalg.norm(weight(WIDE), axis=1), rtol=1e-5
    )
    assert kind_of(layout["w"]).name == "dora"
