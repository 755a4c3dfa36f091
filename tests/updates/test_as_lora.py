"""`as_lora` turns additive updates into plain factors exactly, and refuses all others."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import Layout, LoraError, Target
from tests.programs import compiled
from tests.updates import forms
from tests.updates.forms import arrays, name_of, weight

PLAIN = [t for t in (*forms.TARGETS, *forms.PARTS) if t.kind in forms.ADDITIVE]


@pytest.mark.few(12)
@pytest.mark.parametrize("target", PLAIN, ids=name_of)
def test_the_merged_weight_is_the_same(target: Target) -> None:
    layout, adapters = Layout((target,)), {target.path: arrays(target)}
    plain, factors = compiled(lora_jax.as_lora, layout, adapters)
    (found,) = plain.targets
    assert (found.kind, found.parts, found.form) == ("lora", (), target.form)
    assert found.rank <= min(target.fan_in, target.fan_out)
    w = {target.path: weight(target)}
    got = compiled(lora_jax.merge, plain, w, factors)[target.path]
    want = compiled(lora_jax.merge, layout, w, adapters)[target.path]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_plain_lora_stays_as_it_is() -> None:
    target = Target("w", (9, 8), (), (0,), (1,), 2, 3.0, scaling="alpha/sqrt(r)")
    layout, adapters = Layout((target,)), {"w": arrays(target)}
    plain, factors = lora_jax.as_lora(layout, adapters)
    assert plain == layout
    assert factors["w"] is adapters["w"]


@pytest.mark.parametrize("rank", [2, 3])
def test_a_rank_above_min_in_out_becomes_an_identity(rank: int) -> None:
    target = Target("w", (5, 8), (), (0,), (1,), rank, 1.0, kind="loha")
    layout, adapters = Layout((target,)), {"w": arrays(target)}
    plain, factors = lora_jax.as_lora(layout, adapters)
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
