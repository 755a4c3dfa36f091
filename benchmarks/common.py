"""The set-ups that all benchmarks share: two published model shapes, their losses, and timing.

Weights are random: neither FLOPs nor time depends on their values. Layers are unrolled, because
XLA's `cost_analysis` counts the body of a scan once.
"""

import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

import lora_jax
from lora_jax import models

MINILM = models.BertConfig(
    vocab_size=30_522,
    hidden_size=384,
    num_layers=6,
    num_heads=12,
    mlp_size=1536,
    max_positions=512,
)
SMOLLM2 = models.LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    mlp_size=1536,
    max_positions=2048,
    rope_theta=100_000.0,
)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model, a batch shape and a loss.

    Attributes:
        loss: (params, batch) -> scalar, the whole of what is differentiated.
        shapes: the parameter tree as ShapeDtypeStructs.
        batch: the batch as ShapeDtypeStructs.
        bounds: for each entry of the batch, its integers are below this.
        query_value: the targets "q and v" of the paper, as paths of this model.
    """

    name: str
    loss: Callable[[Any, Any], jax.Array]
    shapes: Any
    batch: Mapping[str, jax.ShapeDtypeStruct]
    bounds: Mapping[str, int]
    query_value: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of one batch."""
        return self.batch["input_ids"].size

    def specs(self) -> dict[str, lora_jax.LoraSpec]:
        """What is compared with full fine-tuning: r=8 on q and v, and on every product."""
        return {
            "q and v": lora_jax.LoraSpec(rank=8, alpha=16.0, targets=self.query_value),
            "all-linear": lora_jax.LoraSpec(rank=8, alpha=16.0, targets="all-linear"),
        }

    def layout(self, spec: lora_jax.LoraSpec) -> lora_jax.Layout:
        """The spec resolved on this model."""
        return lora_jax.resolve(spec, self.loss, self.shapes, self.batch)

    def arrays(self, seed: int = 0) -> tuple[Any, dict[str, jax.Array]]:
        """Random parameters and a random batch."""
        key = jax.random.key(seed)
        batch = {
            name: jax.random.randint(key, s.shape, 0, self.bounds[name], s.dtype)
            for name, s in self.batch.items()
        }
        return normal(self.shapes, seed), batch


def minilm(rows: int = 32, length: int = 48, config: models.BertConfig = MINILM) -> Setup:
    """Sentence classification: BERT encoder, mean pooling, two classes; mean cross entropy."""
    model = models.BertClassifier(config, 2, "mean")

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch["input_ids"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return Setup(
        name=f"MiniLM {rows} x {length}",
        loss=loss,
        shapes=jax.eval_shape(model.init, jax.random.key(0), ids)["params"],
        batch={"input_ids": ids, "label": jax.ShapeDtypeStruct((rows,), jnp.int32)},
        bounds={"input_ids": config.vocab_size, "label": 2},
        query_value=("bert/encoder/layer_*/attention/{query,value}/kernel",),
    )


def smollm2(rows: int = 8, length: int = 48, config: models.LlamaConfig = SMOLLM2) -> Setup:
    """Language modelling: Llama decoder with tied embeddings; cross entropy over all tokens."""
    model = models.Llama(config)

    def loss(params: Any, batch: Any) -> jax.Array:
        logits = model.apply({"params": params}, batch["input_ids"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return Setup(
        name=f"SmolLM2 {rows} x {length}",
        loss=loss,
        shapes=jax.eval_shape(model.init, jax.random.key(0), ids)["params"],
        batch={"input_ids": ids, "targets": ids},
        bounds={"input_ids": config.vocab_size, "targets": config.vocab_size},
        query_value=("layers_*/attention/{q,v}/kernel",),
    )


SETUPS: dict[str, Callable[..., Setup]] = {"minilm": minilm, "smollm2": smollm2}


def normal(shapes: Any, seed: int) -> Any:
    """Arrays of these shapes, N(0, 0.02^2)."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        0.02 * jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def full_gradient(setup: Setup) -> Callable[..., Any]:
    """(params, batch) -> loss and its gradient with respect to every parameter."""
    return jax.value_and_grad(setup.loss)


def lora_gradient(setup: Setup, layout: lora_jax.Layout) -> Callable[..., Any]:
    """(adapters, params, batch) -> loss and its gradient with respect to the adapters alone."""
    adapted = lora_jax.adapt(layout, setup.loss)
    return jax.value_and_grad(lambda adapters, params, batch: adapted(params, adapters, batch))


def adapter_shapes(layout: lora_jax.Layout) -> Any:
    """The adapter tree of the layout as ShapeDtypeStructs."""
    return jax.eval_shape(lambda key: lora_jax.init(key, layout), jax.random.key(0))


def adapters(layout: lora_jax.Layout) -> Any:
    """Random adapters with a random b as well: that of the first step, zeros, is no usual one."""
    return normal(adapter_shapes(layout), seed=1)


def interleaved(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each run; every repeat runs all of them, so a busy moment hits all."""
    for run in runs.values():
        jax.block_until_ready(run())
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def hardware(*more: str) -> str:
    """One line: processor, cores that this process may use, and versions."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    versions = [f"Python {platform.python_version()}", f"JAX {jax.__version__}"]
    versions += [f"Flax {flax.__version__}", *more]
    return f"{_processor()}, {usable} cores, {jax.default_backend()}; {', '.join(versions)}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models_named = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    except OSError:
        models_named = []
    return models_named[0] if models_named else platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
