"""`as_lora` turns updates into plain factors: exactly, or to the rank that is asked for."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import Layout, LoraError, Target
from lora_jax.analysis import matrices
from tests.programs import compiled
from tests.updates import forms
from tests.updates.forms import arrays, name_of, weight

PLAIN = [t for t in (*forms.TARGETS, *forms.PARTS) if t.kind in forms.ADDITIVE]


@pytest.mark.few(12)
@pytest.mark.parametrize("target", PLAIN, ids=name_of)
def test_the_merged_weight_is_the_same(target: Target) -> None:
    layout, adapters = Layout((target,)), {target.path: arrays(target)}
    plain, factors, errors = compiled(lora_jax.as_lora, layout, adapters)
    (found,) = plain.targets
    assert (found.kind, found.parts, found.form) == ("lora", (), target.form)
    assert found.rank <= min(target.fan_in, target.fan_out)
    assert errors[target.path].error == 0
    w = {target.path: weight(target)}
    got = compiled(lora_jax.merge, plain, w, factors)[target.path]
    want = compiled(lora_jax.merge, layout, w, adapters)[target.path]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_plain_lora_stays_as_it_is() -> None:
    target = Target("w", (9, 8), (), (0,), (1,), 2, 3.0, scaling="alpha/sqrt(r)")
    layout, adapters = Layout((target,)), {"w": arrays(target)}
    plain, factors, _ = lora_jax.as_lora(layout, adapters)
    assert plain == layout
    assert factors["w"] is adapters["w"]


@pytest.mark.parametrize("rank", [2, 3])
def test_a_rank_above_min_in_out_becomes_an_identity(rank: int) -> None:
    target = Target("w", (5, 8), (), (0,), (1,), rank, 1.0, kind="loha")
    layout, adapters = Layout((target,)), {"w": arrays(target)}
    plain, factors, _ = lora_jax.as_lora(layout, adapters)
    assert plain["w"].rank == min(5, rank**2)
    if rank == 3:
        np.testing.assert_array_equal(factors["w"].a, np.eye(5))


def test_dora_and_a_bias_are_refused_by_name() -> None:
    dora = Target("w", (9, 8), (), (0,), (1,), 2, 1.0, kind="dora")
    with pytest.raises(LoraError, match=r"'w': an update of the kind 'dora' rescales W itself"):
        lora_jax.as_lora(Layout((dora,)), {"w": arrays(dora)})
    bias = Target("b", (9,), (), (), (0,), 1, 1.0, kind="bias")
    with pytest.raises(LoraError, match=r"'b': an update of the kind 'bias' has no factors"):
        lora_jax.as_lora(Layout((bias,)), {"b": arrays(bias)})


def change(layout: Layout, params: Any, adapters: Any, onto: Any) -> np.ndarray:
    """Return the merged weight minus another, as [*stack, in, out] in float64."""
    (target,) = layout.targets
    merged = lora_jax.merge(layout, params, adapters)[target.path]
    pair = (matrices.of_weight(target, x).astype(np.float64) for x in (merged, onto))
    return np.subtract(*pair)


@pytest.mark.parametrize("form", ["matrix", "stacked", "kernel"])
@pytest.mark.parametrize("rank", [1, 3, None])
def test_the_change_that_dora_makes_is_the_nearest_and_the_error_is_its_distance(
    form: str, rank: int | None
) -> None:
    target = Target("w", *forms.FORMS[form], 2, 3.0, kind="dora")
    layout, adapters, w = Layout((target,)), {"w": arrays(target)}, weight(target)
    plain, factors, errors = lora_jax.as_lora(layout, adapters, rank, {"w": w})
    want = change(layout, {"w": w}, adapters, w)
    left = np.linalg.norm(want - change(plain, {"w": w}, factors, w))
    values = np.linalg.svd(want, compute_uv=False)
    whole = np.linalg.norm(values)
    assert abs(left - np.linalg.norm(values[..., rank or values.shape[-1] :])) < 1e-5 * whole
    np.testing.assert_allclose(errors["w"], (left, left / whole), atol=1e-5 * whole)
    assert plain["w"].rank == (rank or min(target.fan_in, target.fan_out))


def test_a_base_that_was_changed_is_made_up_for_in_the_original() -> None:
    """PiSSA's adapter over its base is twice its rank over W; LoftQ's holds the quantisation."""
    target = Target("w", (9, 8), (), (0,), (1,), 2, 3.0)
    layout, w = Layout((target,)), {"w": weight(target)}
    start = lora_jax.init_from_base(layout, w, "pissa")
    trained = {"w": arrays(target)}
    plain, factors, errors = lora_jax.as_lora(layout, trained, 4, start.params, w)
    want = lora_jax.merge(layout, start.params, trained)["w"]
    np.testing.assert_allclose(lora_jax.merge(plain, w, factors)["w"], want, atol=2e-5)
    assert errors["w"].relative < 1e-5
    quantised = lora_jax.quantize(w, "int4", layout, block=3)
    *_, errors = lora_jax.as_lora(layout, trained, 4, quantised, w)
    assert errors["w"].relative > 1e-3  # what is lost of the rounding, which has full rank
    with pytest.raises(LoraError, match="needs params="):
        lora_jax.as_lora(layout, trained, 4, onto=w)


def test_adapters_of_several_kinds_are_stacked_and_combined() -> None:
    form = forms.FORMS["stacked"]
    targets = [Target("w", *form, 2, 3.0, kind=kind) for kind in forms.ADDITIVE]
    targets += [Target("w", *form, 2, 3.0, parts=((2, 4),))]
    targets += [Target("w", *form, 2, 3.0, scaling="alpha/sqrt(r)")]
    members = [(Layout((t,)), {"w": arrays(t, i)}) for i, t in enumerate(targets)]
    w = {"w": weight(targets[0])}
    layout, stacked = jax.device_get(compiled(lora_jax.multi.stack, members))
    merge = jax.jit(lora_jax.merge, static_argnums=0)
    whole, deltas = np.asarray(w["w"]), []
    for i, (own, adapters) in enumerate(members):
        want = np.asarray(merge(own, w, adapters)["w"])
        taken = jax.tree.map(lambda x, i=i: x[i], stacked)
        scaled = {"w": taken.factors["w"]._replace(b=taken.factors["w"].b * taken.scales["w"])}
        np.testing.assert_allclose(merge(layout, w, scaled)["w"], want, rtol=1e-5, atol=1e-5)
        deltas.append(want - whole)
    weights = [0.5, -1.0, 2.0, 1.0, 1.5, 0.25, 1.0]
    combine = functools.partial(lora_jax.multi.combine, weights=weights)
    both, combined, _ = compiled(combine, members)
    want = whole + sum(c * d for c, d in zip(weights, deltas, strict=True))
    got = merge(both, w, combined)["w"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))
