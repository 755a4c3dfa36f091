"""Laws for any weights: scan, remat, padding, packing, causality, dtypes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import models
from lora_jax.models.experts import ExpertMlp
from tests.models.options import (
    DEBERTA,
    DEBERTA_UNSHARED,
    FAMILIES,
    MODERNBERT,
    random_params,
)

Config = models.BertConfig | models.DecoderConfig
Apply = Callable[..., jax.Array]


@pytest.fixture(params=["bert", "llama"])
def config(request: pytest.FixtureRequest) -> Config:
    return request.getfixturevalue(f"{request.param}_config")


def _model(config: Config) -> models.Bert | models.DecoderModel:
    return (
        models.Bert(config)
        if isinstance(config, models.BertConfig)
        else models.DecoderModel(config)
    )


def _apply(config: Config) -> Apply:
    """Return the compiled model with random parameters."""
    return functools.partial(jax.jit(_model(config).apply), {"params": random_params(config)})


def _stacked(params: Any, layers: int, prefix: str) -> Any:
    """Return the tree of an unrolled model in the form of a scanned model."""
    each = [params[f"{prefix}_{index}"] for index in range(layers)]
    rest = {name: value for name, value in params.items() if not name.startswith(f"{prefix}_")}
    return {**rest, "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)}


def _scanned(params: Any, config: Config) -> Any:
    if isinstance(config, models.BertConfig):
        return {**params, "encoder": _stacked(params["encoder"], config.num_layers, "layer")}
    return _stacked(params, config.num_layers, "layers")


def test_scanned_is_unrolled(config: Config, ids: jax.Array) -> None:
    params = random_params(config)
    plain = _apply(config)(ids)
    scan = dataclasses.replace(config, scan_layers=True)
    scanned = jax.jit(_model(scan).apply)({"params": _scanned(params, config)}, ids)
    np.testing.assert_allclose(scanned, plain, atol=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("remat", "scan"), [("full", True), ("dots", False)], ids=["full, scanned", "dots, unrolled"]
)
def test_remat_changes_no_gradient(config: Config, ids: jax.Array, remat: str, scan: bool) -> None:
    config = dataclasses.replace(config, scan_layers=scan)
    params = random_params(config)

    def loss(config: Config) -> Callable[[Any], jax.Array]:
        return lambda params: (_model(config).apply({"params": params}, ids) ** 2).mean()

    again = loss(dataclasses.replace(config, remat=remat))
    assert "remat" in str(jax.make_jaxpr(again)(params))  # or two equal programs would be compared
    assert "remat" not in str(jax.make_jaxpr(loss(config))(params))

    want, got = (jax.jit(jax.grad(f))(params) for f in (loss(config), again))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5 * largest), want, got
    )


def test_padding_does_not_leak(config: Config, ids: jax.Array) -> None:
    apply = _apply(config)
    mask = jnp.ones(ids.shape, bool).at[1, 5:].set(False)
    one = apply(ids, mask)
    other = apply(jnp.where(mask, ids, (ids + 7) % config.vocab_size), mask)
    np.testing.assert_array_equal(one[mask], other[mask])
    # The real tokens come out as if the row ended with them.
    np.testing.assert_allclose(one[1, :5], apply(ids[1:, :5])[0], atol=1e-5)
    # In an encoder, which looks ahead, padding changes nothing only because of the mask.
    if isinstance(config, models.BertConfig):
        assert np.abs(apply(ids)[1, :5] - one[1, :5]).max() > 1e-2


@pytest.mark.few(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_packed(llama_config: models.DecoderConfig, ids: jax.Array, family: str) -> None:
    assert_packed_are_rows(dataclasses.replace(llama_config, **FAMILIES[family]), ids)


def test_modernbert_packed_and_scanned(bert_config: models.BertConfig, ids: jax.Array) -> None:
    config = dataclasses.replace(bert_config, **MODERNBERT)
    assert_packed_are_rows(config, ids)
    params, scan = random_params(config), dataclasses.replace(config, scan_layers=True)
    # A stack has a norm for every layer; that of the first layer is not used.
    layer = params["encoder"]["layer_0"]
    unused = {"attention_norm": jax.tree.map(jnp.zeros_like, layer["mlp_norm"])}
    whole = {**params, "encoder": {**params["encoder"], "layer_0": {**layer, **unused}}}
    got = jax.jit(models.Bert(scan).apply)({"params": _scanned(whole, config)}, ids)
    want = jax.jit(models.Bert(config).apply)({"params": params}, ids)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_relative_positions_packed(bert_config: models.BertConfig, ids: jax.Array) -> None:
    config = dataclasses.replace(bert_config, **DEBERTA_UNSHARED)
    assert_packed_are_rows(config, ids)
    with pytest.raises(ValueError, match="convolution of this model reaches into neighbours"):
        _apply(dataclasses.replace(bert_config, **DEBERTA))(ids, segment_ids=ids)


def test_experts_are_those_of_the_router(llama_config: models.DecoderConfig) -> None:
    options = {**FAMILIES["mixture"], "renormalised": True}
    config = dataclasses.replace(llama_config, **options)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 16)), jnp.float32)
    params = jax.jit(ExpertMlp(config).init)(jax.random.key(0), x)["params"]
    same = jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), params["experts"])
    gate, up, down = (same[name]["kernel"][0] for name in ("gate", "up", "down"))
    got = ExpertMlp(config).apply({"params": {**params, "experts": same}}, x)
    np.testing.assert_allclose(got, (jax.nn.silu(x @ gate) * (x @ up)) @ down, atol=1e-6)


@pytest.mark.parametrize("given", [False, True], ids=["positions counted", "positions given"])
def test_packed_segments_are_separate_rows(config: Config, ids: jax.Array, given: bool) -> None:
    assert_packed_are_rows(config, ids, given)


def assert_packed_are_rows(config: Config, ids: jax.Array, given: bool = False) -> None:
    """Compare the segments of packed rows with rows of their own; `given`: with positions."""
    apply = _apply(config)
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2, 2, 0]])
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 0, 1, 2, 0]])
    packed = apply(ids, segment_ids=segments, positions=positions if given else None)
    for row, start, stop in [(0, 0, 3), (0, 3, 7), (1, 0, 4), (1, 4, 7)]:
        alone = apply(ids[row : row + 1, start:stop])[0]
        np.testing.assert_allclose(packed[row, start:stop], alone, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_causality(llama_config: models.DecoderConfig, window: int | None) -> None:
    """An output's gradient is zero at every later token, and at every token before the window."""
    config = dataclasses.replace(
        llama_config, tied=False, num_layers=1, vocab_size=8, sliding_window=window
    )
    params = random_params(config)
    tokens = jnp.arange(8)[None]  # each position has its own row of the embedding

    def outputs(embedding: jax.Array) -> jax.Array:
        tree = {**params, "embed": {"embedding": embedding}}
        return models.DecoderModel(config).apply({"params": tree}, tokens)[0, :, 0]

    slopes = jax.jit(jax.jacobian(outputs))(params["embed"]["embedding"])
    distance = np.subtract.outer(np.arange(8), np.arange(8))
    want = (distance >= 0) & (distance < (window or 8))
    np.testing.assert_array_equal(np.abs(slopes).max(axis=-1) > 0, want)


def test_bfloat16_is_near_and_its_logits_are_float32(
    llama_config: models.DecoderConfig, ids: jax.Array
) -> None:
    params = random_params(llama_config)
    half = dataclasses.replace(llama_config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    logits = jax.jit(models.DecoderModel(half).apply)({"params": low}, ids)
    assert logits.dtype == jnp.float32
    near = _apply(llama_config)(ids)
    assert 0 < np.abs(logits - near).max() < 0.1 * np.abs(near).max()


@pytest.mark.few(2)
@pytest.mark.parametrize("only", ["dropout", "attention_dropout"])
def test_dropout_only_where_asked(config: Config, ids: jax.Array, only: str) -> None:
    params = random_params(config)
    model = _model(dataclasses.replace(config, **{only: 0.5}))

    @functools.partial(jax.jit, static_argnums=0)
    def run(deterministic: bool, key: jax.Array) -> jax.Array:
        rngs = {"dropout": key}
        return model.apply({"params": params}, ids, deterministic=deterministic, rngs=rngs)

    still = _apply(config)(ids)
    np.testing.assert_allclose(run(True, jax.random.key(0)), still, atol=1e-5)
    moved = run(False, jax.random.key(0))
    assert np.abs(moved - still).max() > 1e-2
    np.testing.assert_array_equal(run(False, jax.random.key(0)), moved)
    assert np.abs(run(False, jax.random.key(1)) - moved).max() > 1e-2


def test_no_dropout_costs_nothing(config: Config, ids: jax.Array) -> None:
    """Without dropout the program of training is that of evaluation, down to the last equation."""
    model, params = _model(config), models.shapes(config)

    def program(deterministic: bool) -> str:
        apply = functools.partial(model.apply, deterministic=deterministic)
        return str(jax.make_jaxpr(apply)({"params": params}, ids))

    assert program(False) == program(True)


def _masks(model: Any, params: Any, ids: jax.Array) -> int:
    """Return the number of dropout masks that a call draws."""

    def run(params: Any) -> Any:
        rngs = {"dropout": jax.random.key(0)}
        return model.apply({"params": params}, ids, deterministic=False, rngs=rngs)

    return str(jax.make_jaxpr(run)(params)).count("name=_bernoulli")


def test_deberta_drops_its_convolution(bert_config: models.BertConfig, ids: jax.Array) -> None:
    found = []
    for size in (0, 3):
        relative = dataclasses.replace(DEBERTA["relative"], conv_size=size)
        config = dataclasses.replace(bert_config, dropout=0.5, **DEBERTA | {"relative": relative})
        found.append(_masks(models.Bert(config), models.shapes(config), ids))
    assert found[1] == found[0] + 1


@pytest.mark.parametrize(
    ("pooler", "head", "count"), [(True, None, 2), (False, None, 1), (True, 0.0, 0)]
)
def test_dropout_of_the_head(
    bert_config: models.BertConfig, ids: jax.Array, pooler: bool, head: float | None, count: int
) -> None:
    config = dataclasses.replace(bert_config, dropout=0.5, pooler_dropout=pooler, head_dropout=head)
    model = models.BertClassifier(config, 3, "roberta_head")
    whole = _masks(model, models.shapes(config, models.Head("roberta_head", 3)), ids)
    assert whole - _masks(models.Bert(config), models.shapes(config), ids) == count


@pytest.mark.parametrize("pooling", ["mean", "cls", "roberta_head"])
def test_head_ignores_padding(bert_config: models.BertConfig, ids: jax.Array, pooling: str) -> None:
    model = models.BertClassifier(bert_config, num_classes=3, pooling=pooling)
    params = random_params(bert_config, models.Head(pooling, num_classes=3))
    apply = functools.partial(jax.jit(model.apply), {"params": params})
    mask = jnp.ones(ids.shape, bool).at[1, 5:].set(False)
    logits = apply(ids, mask)
    assert logits.shape == (2, 3) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[1:], apply(ids[1:, :5]), atol=1e-5)
    # The rows that fill up a batch have no real token at all.
    assert np.isfinite(apply(ids, jnp.zeros(ids.shape, bool))).all()


def test_rows_that_are_too_long_are_an_error(bert_config: models.BertConfig) -> None:
    model = models.Bert(bert_config)
    with pytest.raises(ValueError, match=r"33 tokens in a row.*positions for 32"):
        jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 33), jnp.int32))


@pytest.mark.parametrize(
    ("field", "value"), [("remat", "dot"), ("activation", "swish")], ids=["remat", "activation"]
)
def test_unknown_choice_lists_the_choices(
    bert_config: models.BertConfig, field: str, value: str
) -> None:
    with pytest.raises(ValueError, match=f"{field}: got '{value}', expected one of"):
        models.shapes(dataclasses.replace(bert_config, **{field: value}))
