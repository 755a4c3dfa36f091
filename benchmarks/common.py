"""Set-ups that all benchmarks share: the losses of two published model shapes, and tables.

Weights are random, because neither FLOPs nor time depends on their values. Layers are unrolled,
because XLA's `cost_analysis` counts the body of a scan once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax
from lora_jax import models
from measuring.published_models import MINILM as MINILM
from measuring.published_models import SMOLLM2 as SMOLLM2
from measuring.published_models import normal as normal
from measuring.timing import hardware as hardware
from measuring.timing import interleaved as interleaved


@dataclasses.dataclass(frozen=True)
class ModelSetup:
    """A model, a batch shape and a loss.

    Attributes:
        name: the name of the model and the shape of the batch.
        loss: (params, batch) -> scalar, the function that is differentiated.
        shapes: the parameter tree as ShapeDtypeStructs.
        batch: the batch as ShapeDtypeStructs.
        bounds: name of an array of the batch -> upper bound of its integers.
        query_value: the targets "q and v" of the paper, as patterns for this model.
    """

    name: str
    loss: Callable[[Any, Any], jax.Array]
    shapes: Any
    batch: Mapping[str, jax.ShapeDtypeStruct]
    bounds: Mapping[str, int]
    query_value: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """The number of tokens of a batch."""
        return self.batch["input_ids"].size

    def specs(self) -> dict[str, lora_jax.LoraSpec]:
        """Return the specs to compare with full fine-tuning: r=8 on q and v, on every product."""
        return {
            "q and v": lora_jax.LoraSpec(rank=8, alpha=16.0, targets=self.query_value),
            "all-linear": lora_jax.LoraSpec(rank=8, alpha=16.0, targets="all-linear"),
        }

    def layout(self, spec: lora_jax.LoraSpec) -> lora_jax.Layout:
        """Resolve a spec on this model."""
        return lora_jax.resolve(spec, self.loss, self.shapes, self.batch)

    def arrays(self, seed: int = 0) -> tuple[Any, dict[str, jax.Array]]:
        """Return random parameters and a random batch."""
        key = jax.random.key(seed)
        batch = {
            name: jax.random.randint(key, s.shape, 0, self.bounds[name], s.dtype)
            for name, s in self.batch.items()
        }
        return normal(self.shapes, seed), batch


def minilm(rows: int = 32, length: int = 48, config: models.BertConfig = MINILM) -> ModelSetup:
    """Return a classifier: BERT encoder, mean pooling, two classes, mean cross entropy."""
    model = models.BertClassifier(config, 2, "mean")

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch["input_ids"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return ModelSetup(
        name=f"MiniLM {rows} x {length}",
        loss=loss,
        shapes=jax.eval_shape(model.init, jax.random.key(0), ids)["params"],
        batch={"input_ids": ids, "label": jax.ShapeDtypeStruct((rows,), jnp.int32)},
        bounds={"input_ids": config.vocab_size, "label": 2},
        query_value=("bert/encoder/layer_*/attention/{query,value}/kernel",),
    )


def smollm2(rows: int = 8, length: int = 48, config: models.DecoderConfig = SMOLLM2) -> ModelSetup:
    """Return language modelling: Llama decoder, tied embeddings, cross entropy over all tokens."""
    model = models.DecoderModel(config)

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch["input_ids"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return ModelSetup(
        name=f"SmolLM2 {rows} x {length}",
        loss=loss,
        shapes=jax.eval_shape(model.init, jax.random.key(0), ids)["params"],
        batch={"input_ids": ids, "targets": ids},
        bounds={"input_ids": config.vocab_size, "targets": config.vocab_size},
        query_value=("layers_*/attention/{q,v}/kernel",),
    )


SETUPS: dict[str, Callable[..., ModelSetup]] = {"minilm": minilm, "smollm2": smollm2}


def full_gradient(setup: ModelSetup) -> Callable[..., Any]:
    """Return (params, batch) -> loss and its gradient with respect to every parameter."""
    return jax.value_and_grad(setup.loss)


def lora_gradient(setup: ModelSetup, layout: lora_jax.Layout) -> Callable[..., Any]:
    """Return (adapters, params, batch) -> loss and its gradient with respect to the adapters."""
    adapted = lora_jax.adapt(layout, setup.loss)
    return jax.value_and_grad(lambda adapters, params, batch: adapted(params, adapters, batch))


def adapter_shapes(layout: lora_jax.Layout) -> Any:
    """Return the adapter tree of the layout as ShapeDtypeStructs."""
    return jax.eval_shape(lambda key: lora_jax.init(key, layout), jax.random.key(0))


def adapters(layout: lora_jax.Layout) -> Any:
    """Return random adapters with a random b, because it is zero in the first step only."""
    return normal(adapter_shapes(layout), seed=1)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
