"""Activated LoRA: a prompt read by the base, and tokens that an adapter changes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Adapter, Layout, LoraError, LoraSpec, models, multi
from lora_jax.exchange import mlx, peft
from lora_jax.models import cache as caches
from tests import npz
from tests.exchange.tiny import ADAPTERS, GOLDEN, built_in

IDS = np.array([[3, 5, 9, 4, 6, 8], [5, 9, 7, 5, 9, 2], [4, 4, 4, 4, 4, 4]])
TOKENS = (5, 9)
SPEC = LoraSpec(2, 4.0, ("**/q/kernel", "**/down/kernel", "embed/embedding"), kind="alora")


def of_kind(layout: Layout, kind: str) -> Layout:
    return Layout(tuple(dataclasses.replace(t, kind=kind) for t in layout.targets))


@functools.cache
def setup(scan: bool = False, quantized: bool = False, kind: str = "alora") -> Any:
    """Return a tiny decoder, its parameters, and two adapters that change its logits."""
    model = built_in("llama", scan)
    params, own = model.params, SPEC.targets[: 2 if kind == "ia3" else 3]
    spec = dataclasses.replace(SPEC, kind=kind, targets=own)
    layout = lora_jax.resolve(spec, model.f, params, IDS)
    if quantized:
        params = lora_jax.quantize(params, "nf4", layout.subset("**/down/kernel"))
    start = lora_jax.init(jax.random.key(0), layout, params=params)
    draw = np.random.default_rng(0).standard_normal
    moved = lambda x: jnp.asarray(x + 0.3 * draw(x.shape), x.dtype)  # noqa: E731
    return model.f, params, layout, [jax.tree.map(moved, start) for _ in range(2)]


def run(layout: Layout, f: Any, params: Any, adapters: Any, *args: Any) -> Any:
    return jax.jit(lora_jax.adapt(layout, f))(params, adapters, *args)


@pytest.mark.parametrize(
    ("kind", "scan", "quantized"),
    [("alora", False, False), ("alora", True, True), ("dora", True, True), ("ia3", False, False)],
)
def test_all_tokens_none_and_some(kind: str, scan: bool, quantized: bool) -> None:
    f, params, layout, (one, _) = setup(scan, quantized, kind)
    on = lambda active: run(layout, f, params, multi.activated(one, active), IDS)  # noqa: E731
    plain = of_kind(layout, "lora" if kind == "alora" else kind)
    whole, base = run(plain, f, params, one, IDS), run(Layout(), f, params, {}, IDS)
    np.testing.assert_allclose(on(True), whole, atol=1e-5)
    np.testing.assert_array_equal(on(np.zeros(IDS.shape, bool)), base)
    active = multi.invoked(IDS, TOKENS)
    some = on(active)
    np.testing.assert_array_equal(np.asarray(active[2]), [False] * 6)
    np.testing.assert_allclose(some[~active], np.asarray(base)[~active], atol=1e-6)
    assert np.abs(some - base)[active].min(axis=-1).max() > 1e-4
    assert np.abs(some - whole)[0, 1:].max() > 1e-3  # they see the base's keys and values


def test_the_prompt_is_read_once_for_all_adapters() -> None:
    """Law: the base's cache of what comes before, and each adapter after it, is `activated`."""
    f, params, layout, two = setup()
    decoder = models.DecoderModel(models.open(str(GOLDEN / "golden_models" / "llama")).config)
    before, after = IDS[:1, :3], np.concatenate([TOKENS, [2]])[None].repeat(2, 0)
    read = lambda p, ids, cache: decoder.apply({"params": p}, ids, cache, method="decode")  # noqa: E731
    _, shared = jax.jit(read)(params, before, caches.empty(decoder.config, 1, 0))
    many, stacked = multi.stack([(layout, one) for one in two])
    each = jax.tree.map(lambda x: jnp.repeat(x, 2, 0), shared)
    chosen = multi.activated(multi.select(stacked, jnp.arange(2)), True)
    found, _ = run(many, read, params, chosen, after, each)
    ids = np.concatenate([before.repeat(2, 0), after], axis=1)
    active = multi.invoked(ids, TOKENS)
    mixed = multi.activated(multi.select(stacked, jnp.arange(2)), active)
    whole = run(many, f, params, mixed, ids)
    for i, one in enumerate(two):
        alone = multi.activated(one, active[i : i + 1])
        expected = run(layout, f, params, alone, ids[i : i + 1])
        np.testing.assert_allclose(found[i], expected[0, 3:], atol=1e-5)
        np.testing.assert_allclose(whole[i], expected[0], atol=1e-5)


def test_gradients_come_from_active_tokens_alone() -> None:
    f, params, layout, (one, _) = setup()
    key = jax.random.key(1)

    def loss(adapters: Any, active: Any) -> Any:
        dropped = multi.dropout(multi.activated(adapters, active), key, 0.2)
        return jnp.square(lora_jax.adapt(layout, f)(params, dropped, IDS)).sum()

    none, some = (jax.jit(jax.grad(loss))(one, x) for x in (False, multi.invoked(IDS, TOKENS)))
    assert all(not x.any() for x in jax.tree.leaves(none))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(some))


def test_an_adapter_that_waits_is_never_taken_as_plain_lora(tmp_path: Path) -> None:
    f, params, layout, (one, _) = setup()
    many, stacked = multi.stack([(layout, one)])
    for chosen in (one, multi.dropout(one, jax.random.key(0), 0.1)):
        with pytest.raises(LoraError, match=r"some tokens only; pass lora_jax.multi.activated"):
            lora_jax.adapt(layout, f)(params, chosen, IDS)
    with pytest.raises(LoraError, match="activated"):
        lora_jax.adapt(many, f)(params, multi.select(stacked, 0), IDS)
    with pytest.raises(LoraError, match="no merged weight equals it"):
        lora_jax.merge(layout, params, one)
    with pytest.raises(LoraError, match="on for some tokens only"):
        lora_jax.as_lora(layout, one)
    names = built_in("llama").names
    with pytest.raises(LoraError, match="invocation=the tokens"):
        peft.save(tmp_path / "a", names, Adapter(layout, one), base="b")
    with pytest.raises(LoraError, match="invocation=the tokens"):
        mlx.save(tmp_path / "mlx", names, (layout, one))
    fewer = multi.activated(one, np.ones((3, 5), bool))
    with pytest.raises(LoraError, match=r"shape \[3, 5\], .* shape \[3, 6"):
        lora_jax.adapt(layout, f)(params, fewer, IDS)
    with pytest.raises(LoraError, match="booleans, got an array of int"):
        multi.activated(one, IDS)
    lora_jax.save(tmp_path / "saved", Adapter(layout, one))
    again = lora_jax.restore(tmp_path / "saved").layout
    assert again == layout


def test_logits_are_those_of_peft(tmp_path: Path) -> None:
    model, golden = built_in("llama"), npz.read(ADAPTERS / "alora" / "expected.npz")
    load = lambda folder: peft.load(folder, model.names, model.f, model.params, model.x)  # noqa: E731
    adapter, ids = load(ADAPTERS / "alora"), golden["input_ids"]
    tokens = peft.describe(ADAPTERS / "alora").settings["alora_invocation_tokens"]
    peft.save(tmp_path, model.names, adapter, base="b", invocation=tokens)
    settings = peft.describe(tmp_path).settings
    assert (settings["alora_invocation_tokens"], settings["task_type"]) == (tokens, "CAUSAL_LM")
    for layout, found, _ in (adapter, load(tmp_path)):
        chosen = multi.activated(found, multi.invoked(ids, tokens))
        out = run(layout, model.f, model.params, chosen, ids)
        np.testing.assert_allclose(out, golden["out"], atol=1e-5)
    more = adapter._replace(trainable={"norm/scale": np.ones(8)})
    with pytest.raises(LoraError, match="plain factors alone"):
        peft.save(tmp_path, model.names, more, base="b", invocation=tokens, overwrite=True)
