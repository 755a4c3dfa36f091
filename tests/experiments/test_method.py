"""Every method on the models: the parameters that it trains, their number, and its step 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from experiments import methods
from experiments.paper import counts
from lora_jax import models, paths

BERT = models.BertConfig(
    vocab_size=19, hidden_size=16, num_layers=3, num_heads=4, mlp_size=20, max_positions=32
)
LLAMA = models.DecoderConfig(
    vocab_size=19, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4,
    mlp_size=20, max_positions=32, qkv_bias=True,
)  # fmt: skip
D, M, L, R = 16, 20, 3, 5
HEAD = models.Head("mean", 2)
Make = Callable[[Any], methods.Method]


def size_of(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


ALL = size_of(models.shapes(BERT))
LLAMA_LAYER = size_of(models.shapes(LLAMA)["layers_0"])
ADAPTER = 2 * D * R + R + D

# For each method, its count on the encoder and on the decoder (None: it does not work there).
METHODS: dict[str, tuple[Make, int, int | None]] = {
    "full": (methods.full, ALL, size_of(models.shapes(LLAMA))),
    "top_layers": (
        lambda config: methods.top_layers(config, 2), 2 * counts.layer(D, M), 2 * LLAMA_LAYER
    ),
    "bitfit": (methods.bitfit, counts.biases(D, M, L), L * (16 + 8 + 8)),
    "head": (methods.head, 0, None),
    "houlsby": (
        lambda config: methods.houlsby(config, R),
        counts.adapter(D, R, 2 * L, norms=2 * L + 1),
        counts.adapter(D, R, 2 * L, norms=2 * L + 1, per_norm=1),
    ),
    "pfeiffer": (lambda config: methods.pfeiffer(config, R), L * ADAPTER, L * ADAPTER),
    "adapter_drop": (
        lambda config: methods.adapter_drop(config, R, 2), ADAPTER, ADAPTER
    ),
    "lin": (
        lambda config: methods.lin(config, R),
        counts.adapter(D, R, L, norms=L),
        counts.adapter(D, R, L, norms=L),
    ),
    "prefix_embedding": (
        lambda config: methods.prefix_embedding(config, 3, 2, 8),
        counts.prefix_embedding(D, 3 + 2),
        None,
    ),
    "prefix_layer": (
        lambda config: methods.prefix_layer(config, 3, 2, 8),
        counts.prefix_layer(D, 3 + 2, L),
        None,
    ),
}  # fmt: skip
DECODER = [name for name, (_, _, count) in METHODS.items() if count is not None]


def trained(params: Any, method: methods.Method) -> dict[str, Any]:
    return lora_jax.frozen.split({**params, **method.shapes()}, method.trained)[0]


@pytest.mark.parametrize("name", METHODS)
def test_counts_of_an_encoder(name: str) -> None:
    make, count, _ = METHODS[name]
    found = trained(models.shapes(BERT, HEAD), make(BERT))
    own = {path: x for path, x in found.items() if not path.startswith("classifier/")}
    assert size_of(own) == count
    assert (len(own) < len(found)) == (name == "full")  # it names the head too


@pytest.mark.parametrize("name", DECODER)
def test_counts_of_a_decoder(name: str) -> None:
    make, _, count = METHODS[name]
    assert size_of(trained(models.shapes(LLAMA), make(LLAMA))) == count


def test_counts_of_a_real_model() -> None:
    """RoBERTa base, by shape, has the article's 0.1M with BitFit, and adapters of width 64."""
    config = dataclasses.replace(
        BERT, hidden_size=768, num_layers=12, num_heads=12, mlp_size=3072, vocab_size=50265
    )
    params = models.shapes(config, HEAD)
    assert size_of(trained(params, methods.bitfit(config))) == counts.biases(768, 3072, 12)
    found = size_of(trained(params, methods.pfeiffer(config, 64)))
    assert found == counts.adapter(768, 64, adapters=12)


def test_which_parameters() -> None:
    params = models.shapes(BERT, HEAD)
    folders = {p.split("/")[2] for p in trained(params, methods.top_layers(BERT, 2))}
    assert folders == {"layer_1", "layer_2"}
    folders = {p.split("/")[3] for p in trained(params, methods.adapter_drop(BERT, R, 1))}
    assert folders == {"layer_1", "layer_2"}
    assert {p.rpartition("/")[2] for p in trained(params, methods.bitfit(BERT))} == {"bias"}
    houlsby = trained(params, methods.houlsby(BERT, R))
    base = {p for p in houlsby if not p.startswith("extra/")}
    assert base == {p for p in paths.flatten(params) if "norm/" in p}


def noisy(tree: Any, seed: int) -> Any:
    """Return the tree with random numbers added to its arrays, or in place of its shapes."""
    random = np.random.default_rng(seed)

    def number(x: Any) -> np.ndarray:
        noise = random.normal(0.0, 0.3, x.shape).astype(np.float32)
        return noise if isinstance(x, jax.ShapeDtypeStruct) else np.asarray(x) + noise

    return jax.tree.map(number, tree)


def model_of(config: Any) -> tuple[nn.Module, Any]:
    """Return a model, and parameters that are random everywhere, the biases too."""
    encoder = isinstance(config, models.BertConfig)
    model: nn.Module = models.BertClassifier(config, 2) if encoder else models.DecoderModel(config)
    return model, noisy(models.shapes(config, HEAD if encoder else None), 1)


def run(method: methods.Method, model: nn.Module) -> Any:
    """Return a compiled `f(params, *inputs)`; otherwise each operation would be compiled alone."""
    return jax.jit(lambda params, *inputs: method.apply(model, params, *inputs))


IDS = jnp.asarray(np.random.default_rng(0).integers(1, 19, (2, 8)), jnp.int32)
MASK = jnp.arange(8)[None] < jnp.array([[8], [5]])


@pytest.mark.parametrize(
    ("config", "names"),
    [(BERT, ("lin",)), (LLAMA, ("pfeiffer",))],
    ids=["encoder", "decoder"],
)
def test_step_0_is_the_base(config: Any, names: tuple[str, ...]) -> None:
    """A method begins with the outputs of the base, and changes them once `up` is not zero."""
    model, params = model_of(config)
    base = run(methods.LORA, model)(params, IDS, MASK)
    for name in names:
        method = METHODS[name][0](config)
        f, own = run(method, model), method.init(jax.random.key(2))
        np.testing.assert_allclose(f({**params, **own}, IDS, MASK), base, atol=1e-6, err_msg=name)
        other = f({**params, **noisy(own, 3)}, IDS, MASK)
        assert np.abs(other - base).max() > 1e-3, name


def test_patterns_put_nothing_into_the_model() -> None:
    """A method of patterns adds nothing to the model, so its step 0 is the base's."""
    for name in ("full", "top_layers", "bitfit", "head"):
        assert METHODS[name][0](BERT).extra is None


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: methods.top_layers(BERT, 4), "top_layers must be from 1 to 3, got 4"),
        (lambda: methods.adapter_drop(BERT, R, 3), "drop must be from 1 to 2.*got 3"),
        (lambda: methods.bitfit(dataclasses.replace(LLAMA, qkv_bias=False)), "no bias vectors"),
        (lambda: methods.head(LLAMA), "a decoder has no new head"),
        (lambda: methods.prefix_embedding(LLAMA, 1, 1, 8), "packed rows.*houlsby"),
        (lambda: methods.prefix_layer(BERT, 0, 0, 8), "must be at least 1"),
        (
            lambda: methods.prefix_embedding(BERT, 5, 4, 24),
            r"24 tokens with 5 \+ 4 .* the 32 positions.*--data.max-length to 23",
        ),
    ],
)
def test_what_does_not_go_is_said(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(lora_jax.LoraError, match=f"(?s){says}"):
        make()


@pytest.mark.parametrize("name", ["top_layers", "houlsby", "adapter_drop", "lin", "prefix_layer"])
def test_scanned_layers_are_refused(name: str) -> None:
    config = dataclasses.replace(BERT, scan_layers=True)
    with pytest.raises(lora_jax.LoraError, match=r"model\.scan_layers"):
        METHODS[name][0](config)


@pytest.mark.parametrize("name", ["full", "bitfit"])
def test_patterns_go_with_scanned_layers(name: str) -> None:
    config = dataclasses.replace(BERT, scan_layers=True)
    found = trained(models.shapes(config, HEAD), METHODS[name][0](config))
    own = [x for path, x in found.items() if not path.startswith("classifier/")]
    assert size_of(own) == METHODS[name][1]
