"""The loss in chunks equals the loss at once, and no array holds the logits of all tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import models, paths, sharding
from lora_jax.models.placement import rules
from lora_jax.planner import hlo
from lora_jax.planner.collectives import collectives
from lora_jax.training.causal_lm import apply_of, token_loss
from tests import laws
from tests.models.options import random_params

B, T, V = 2, 10, 96
CONFIG = models.DecoderConfig(
    vocab_size=V, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    mlp_size=24, max_positions=32, tied=True,
)  # fmt: skip


def batch() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        "input_ids": random.integers(0, V, (B, T), np.int32),
        "targets": random.integers(0, V, (B, T), np.int32),
        "segment_ids": np.repeat([[1, 1, 1, 1, 2, 2, 2, 2, 2, 0]], B, 0).astype(np.int32),
        "positions": np.repeat([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0]], B, 0).astype(np.int32),
        "loss_weight": random.integers(0, 2, (B, T)).astype(np.float32),
    }


def small_params(config: models.DecoderConfig) -> Any:
    return jax.tree.map(lambda x: x / 4, random_params(config))


def parts(
    tied: bool, scan: bool, chunk: int | None, targets: tuple[str, ...], smoothing: float = 0.0
) -> Any:
    config = dataclasses.replace(CONFIG, tied=tied, scan_layers=scan)
    model = models.DecoderModel(config)
    params = small_params(config)
    apply = apply_of(model, chunk, smoothing=smoothing)
    spec = lora_jax.LoraSpec(rank=2, alpha=4.0, targets=targets)
    layout = lora_jax.resolve(spec, apply, params, batch(), train=True, key=None)
    adapters = laws.drawn_adapters(layout)
    adapted = lora_jax.adapt(layout, apply)

    def loss(adapters: Any, params: Any) -> Any:
        outputs = adapted(params, adapters, batch(), train=True, key=None)
        found = token_loss(outputs, batch())
        return found.total / found.weight

    return layout, adapters, params, loss


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("tied", "scan", "targets", "chunk"),
    [
        (True, False, ("embed/*",), 5),
        (False, True, ("**/{q,v}/kernel", "lm_head/*"), 3),
    ],
)
def test_it_is_the_loss_at_once(
    tied: bool, scan: bool, targets: tuple[str, ...], chunk: int
) -> None:
    """Loss and gradients are as at once, also with an adapted head."""
    _, adapters, params, whole = parts(tied, scan, None, targets)
    _, _, _, in_chunks = parts(tied, scan, chunk, targets)
    wanted, found = (jax.jit(jax.value_and_grad(f))(adapters, params) for f in (whole, in_chunks))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    for x, y in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_leaves_out_the_head_all_the_same(tied: bool) -> None:
    """Neither chunks nor smoothing change the set of parameters that are adapted."""
    whole, *others = (
        parts(tied, False, chunk, ("all-linear",), smoothing)[0]
        for chunk, smoothing in ((None, 0.0), (None, 0.1), (4, 0.1))
    )
    assert all(other == whole for other in others)


@pytest.mark.parametrize("chunk", [None, 5])
def test_no_array_holds_all_logits(chunk: int | None) -> None:
    _, adapters, params, loss = parts(True, False, chunk, ("**/{q,v}/kernel",))
    text = jax.jit(jax.grad(loss)).lower(adapters, params).compile().as_text()
    sizes = {math.prod(map(int, dims.split(","))) for dims in shapes(text)}
    assert (B * T * V in sizes) == (chunk is None)
    assert max(sizes - {B * T * V}) <= max(V * 16, B * 5 * V, B * T * 24 * 2)


def shapes(text: str) -> list[str]:
    return re.findall(r"f32\[([\d,]+)\]", text)


@pytest.mark.parametrize("tied", [True, False])
def test_over_fsdp_no_chunk_gathers_the_head(tied: bool) -> None:
    """The chunk's tokens go to the head, which each device has for its part of the vocabulary."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    config = dataclasses.replace(CONFIG, tied=tied, vocab_size=2 * V)  # 64 divides it
    model, params = models.DecoderModel(config), small_params(config)
    rows = {name: jnp.asarray(np.repeat(x, 4, 0)) for name, x in batch().items()}

    def loss(params: Any, rows: Any) -> Any:
        keys = ("input_ids", "targets", "segment_ids", "positions")
        each = model.apply({"params": params}, *map(rows.get, keys), chunk=5, method="loss")
        return (each * rows["loss_weight"]).sum()

    expected = jax.jit(jax.value_and_grad(loss))(params, rows)
    place = functools.partial(NamedSharding, mesh)
    specs = sharding.place(params, dict(mesh.shape), table=rules(config))
    with jax.set_mesh(mesh):
        flat = {
            path: jax.device_put(x, place(specs[path])) for path, x in paths.flatten(params).items()
        }
        placed = paths.replace(params, flat)
        rows = jax.device_put(rows, place(P("fsdp")))
        compiled = jax.jit(jax.value_and_grad(loss)).lower(placed, rows).compile()
        found = compiled(placed, rows)
    moved = collectives(hlo.parse(compiled.as_text()))
    whole = config.vocab_size * config.hidden_size // 2  # a device's part over tensor
    assert all(c.times == 1 for c in moved if c.result.size >= whole)
    assert max(c.times for c in moved) > 1  # of a chunk
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("chunk", [None, 3])
def test_label_smoothing_is_optax(chunk: int | None) -> None:
    model = models.DecoderModel(CONFIG)
    params = small_params(CONFIG)
    plain, smoothed = apply_of(model), apply_of(model, chunk, smoothing=0.1)

    def by_optax(params: Any) -> Any:
        logits = plain(params, batch(), train=True, key=None)
        labels = optax.smooth_labels(jax.nn.one_hot(batch()["targets"], V), 0.1)
        return (optax.softmax_cross_entropy(logits, labels) * batch()["loss_weight"]).sum()

    def of(apply: Any, train: bool, params: Any) -> Any:
        return token_loss(apply(params, batch(), train=train, key=None), batch()).total

    wanted = jax.jit(jax.value_and_grad(by_optax))(params)
    found = jax.jit(jax.value_and_grad(lambda params: of(smoothed, True, params)))(params)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            x, y, rtol=1e-5, atol=1e-5 * float(jnp.abs(y).max())
        ),
        found,
        wanted,
    )
    still = jax.jit(lambda params: [of(apply, False, params) for apply in (smoothed, plain)])
    np.testing.assert_allclose(*still(params), rtol=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize(("chunk", "scan", "remat"), [(None, False, "none"), (3, True, "full")])
def test_dropout_and_adapters(chunk: int | None, scan: bool, remat: str) -> None:
    """With one key, adapted equals merged: in outputs, and in the gradients of the adapters."""
    config = dataclasses.replace(
        CONFIG, dropout=0.3, attention_dropout=0.3, scan_layers=scan, remat=remat, num_layers=2
    )
    model, key = models.DecoderModel(config), jax.random.key(7)
    params = small_params(config)
    apply = apply_of(model, chunk)
    spec = lora_jax.LoraSpec(rank=2, alpha=4.0, targets=("all-linear",))
    layout = lora_jax.resolve(spec, apply, params, batch(), train=True, key=key)
    adapters = laws.drawn_adapters(layout)

    def adapted(adapters: Any) -> Any:
        outputs = lora_jax.adapt(layout, apply)(params, adapters, batch(), train=True, key=key)
        return token_loss(outputs, batch()).total

    def merged(adapters: Any) -> Any:
        whole = lora_jax.merge(layout, params, adapters)
        return token_loss(apply(whole, batch(), train=True, key=key), batch()).total

    found, wanted = (jax.jit(jax.value_and_grad(f))(adapters) for f in (adapted, merged))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for x, y in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * float(jnp.abs(y).max()))
    run = jax.jit(lambda train: apply(params, batch(), train=train, key=key), static_argnums=0)
    assert np.abs(run(False) - run(True)).max() > 1e-3
