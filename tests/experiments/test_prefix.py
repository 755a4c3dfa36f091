"""The positions of a prefix's learned vectors, and their effect on the rest of the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import methods
from experiments.methods import prefix
from lora_jax import models
from lora_jax.models.bert import _BertLayer, _Embeddings
from lora_jax.models.sight import visible
from tests.experiments.test_method import BERT, IDS, MASK, model_of, noisy, run

ROBERTA = dataclasses.replace(BERT, position_offset=2, num_token_types=1)
LP, LI = 3, 2


@pytest.mark.few(1)
@pytest.mark.parametrize(("before", "behind"), [(3, 2), (0, 2), (3, 0)])
def test_places_are_those_of_a_loop(before: int, behind: int) -> None:
    lengths = [4, 2, 0]
    mask = jnp.arange(4)[None] < jnp.array(lengths)[:, None]
    found = prefix.places(mask, before, behind)
    for row, length in enumerate(lengths):
        slots = [*range(before), *[-1] * length, *range(before, before + behind)]
        size = 4 + before + behind
        assert found.slot[row].tolist() == slots + [-1] * (size - len(slots))
        assert found.real[row].tolist() == [i < len(slots) for i in range(size)]
        assert found.token[row, before : before + length].tolist() == list(range(length))


def laid_out(vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows laid out by hand, with the special tokens at the end of the vocabulary."""
    special = list(range(vocabulary, vocabulary + LP + LI))
    ids, mask = np.zeros((2, 8 + LP + LI), np.int32), np.zeros((2, 8 + LP + LI), bool)
    for row, length in enumerate((8, 5)):
        tokens = [*special[:LP], *np.asarray(IDS)[row, :length].tolist(), *special[LP:]]
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
    return ids, mask


def pooled(config: Any, hidden: jax.Array, params: Any) -> np.ndarray:
    """Return the head's outputs on the mean over each row's own tokens, computed by hand."""
    out = params["classifier"]["out"]
    rows = [hidden[row, LP : LP + length].mean(axis=0) for row, length in enumerate((8, 5))]
    return np.stack(rows) @ out["kernel"] + out["bias"][None]


@pytest.mark.few(1)
@pytest.mark.parametrize("config", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_prefix_embeddings_are_tokens_of_a_larger_vocabulary(config: Any) -> None:
    model, params = model_of(config)
    method = methods.prefix_embedding(config, LP, LI, 8)
    extra = noisy(method.shapes()["extra"], 5)
    found = run(method, model)({**params, "extra": extra}, IDS, MASK)

    larger = models.Bert(dataclasses.replace(config, vocab_size=19 + LP + LI))
    embeddings = params["bert"]["embeddings"]
    table = jnp.concatenate([embeddings["word"]["embedding"], extra["embedding"]])
    whole = {**params["bert"], "embeddings": {**embeddings, "word": {"embedding": table}}}
    hidden = run(methods.LORA, larger)(whole, *laid_out(19))
    np.testing.assert_allclose(found, pooled(config, hidden, params), atol=1e-4)


def test_prefix_layers_replace_the_inputs_of_every_layer() -> None:
    model, params = model_of(BERT)
    method = methods.prefix_layer(BERT, LP, LI, 8)
    extra = noisy(method.shapes()["extra"], 6)
    found = run(method, model)({**params, "extra": extra}, IDS, MASK)

    ids, mask = laid_out(19)
    bert, places = params["bert"], ids >= 19
    order = np.where(places, ids - 19, 0)
    positions = jnp.arange(ids.shape[1])[None]
    embed, layer = (jax.jit(module(BERT).apply) for module in (_Embeddings, _BertLayer))
    x = embed({"params": bert["embeddings"]}, np.where(places, 0, ids), positions, None)
    seen = visible(ids.shape[1], jnp.asarray(mask))
    for i in range(3):
        x = np.where(places[:, :, None], extra[f"layer_{i}"][order], x)
        x, _ = layer({"params": bert["encoder"][f"layer_{i}"]}, x, seen)
    np.testing.assert_allclose(found, pooled(BERT, x, params), atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "cls", "roberta_head"])
def test_padding_changes_nothing(pooling: str) -> None:
    model = models.BertClassifier(BERT, 2, pooling)
    method = methods.prefix_layer(BERT, LP, LI, 12)
    params = noisy(models.shapes(BERT, models.Head(pooling, 2)), 0)
    whole, f = {**params, **noisy(method.shapes(), 1)}, run(method, model)
    padded = np.pad(IDS, ((0, 0), (0, 4)))
    short, long = f(whole, IDS), f(whole, padded, padded > 0)
    np.testing.assert_allclose(short, long, atol=1e-5)


def test_token_types_stay_with_their_tokens() -> None:
    model, params = model_of(BERT)
    method = methods.prefix_embedding(BERT, LP, 0, 8)
    whole, f = {**params, **noisy(method.shapes(), 1)}, run(method, model)
    zeros, second = np.zeros_like(IDS), np.zeros_like(IDS)
    second[:, 7] = 1  # padding in the second row, a token in the first
    plain, same, typed = (
        f(whole, IDS, MASK),
        f(whole, IDS, MASK, zeros),
        f(whole, IDS, MASK, second),
    )
    np.testing.assert_allclose(same, plain, atol=1e-6)
    np.testing.assert_allclose(typed[1], plain[1], atol=1e-6)
    assert np.abs(typed[0] - plain[0]).max() > 1e-4
