"""GPT-3 175B with r=4 on q and v, the main example of the LoRA article, for planning only.

Command:   python train.py --config configs/gpt3_175b.py --plan --plan-devices 64
Hardware:  2 CPU cores for the plan; 64 GPUs of 80 GB for the run
Minutes:   less than one for the plan (17 s of processor time)
Result:    175 billion parameters, of which 18.9 million are in adapters; a checkpoint of 75 MB
           (38 MB in 16 bits) instead of 349 GB; 5.5 GB on each device for weights, adapters and
           optimizer instead of 16.4 GB. docs/plan.md compares these with the article's numbers.

Its weights are not public, so it can only be planned. The shapes are from table 2.1 of arXiv
2005.14165: 96 layers, width 12288, 96 heads, length 2048. The vocabulary of 50257 is padded to
50304, which is a multiple of the `tensor` axis.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec as P

from lora_jax.models.attention import attend
from lora_jax.models.layers import by_rows, sharded
from lora_jax.models.sight import Sight, visible
from lora_jax.training.config import Config, ConfigError, LoraConfig, MeshConfig, OptimizerConfig
from lora_jax.training.workload import Loss, Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptConfig(Config):
    """The sizes of the model and of a batch."""

    layers: int = 96
    """Decoder layers, which are scanned."""
    width: int = 12288
    """Width of the residual stream; the MLP is four times as wide."""
    heads: int = 96
    """Attention heads."""
    vocabulary: int = 50304
    """Rows of the embedding, including padding."""
    length: int = 2048
    """Tokens of a row, and the number of positions of the model."""
    batch_size: int = 128
    """Rows of a batch."""


BRAIN = jnp.dtype(jnp.bfloat16)  # for weights and computation; norms compute in float32 inside


def dense(features: int, name: str) -> nn.Dense:
    """Return a dense layer with a bias."""
    return nn.Dense(features, dtype=BRAIN, param_dtype=BRAIN, name=name)


def norm(name: str) -> nn.LayerNorm:
    """Return a LayerNorm with scale and bias."""
    return nn.LayerNorm(dtype=BRAIN, param_dtype=BRAIN, name=name)


class Layer(nn.Module):
    """One decoder layer: norm, attention, norm, MLP; [B, T, D] -> [B, T, D]."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, sight: Sight) -> tuple[Array, None]:
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        normed = norm("attention_norm")(x)
        query, key, value = (dense(width, name)(normed).reshape(split) for name in "qkv")
        mixed = attend(query, key, value, sight).reshape(x.shape)
        x = by_rows(x + dense(width, "o")(mixed))
        hidden = nn.gelu(dense(4 * width, "up")(norm("mlp_norm")(x)))
        return by_rows(x + dense(width, "down")(hidden)), None


class Gpt(nn.Module):
    """A GPT: token ids [B, T] -> logits [B, T, V] in float32, with tied embeddings."""

    config: GptConfig

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        config, initial = self.config, nn.initializers.normal(0.02)
        tokens = self.param("tokens", initial, (config.vocabulary, config.width), BRAIN)
        positions = self.param("positions", initial, (config.length, config.width), BRAIN)
        # The lookup shards the table over `tensor` only, since `fsdp` shards the rows of the batch.
        x = jnp.take(sharded(tokens, "tensor"), ids, axis=0) + positions[None, : ids.shape[1]]
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,),
            length=config.layers,
        )
        sight = visible(ids.shape[1], causal=True)
        x, _ = layers(config.heads, name="layers")(by_rows(x), sight)
        x = norm("norm")(x)
        return jnp.einsum("btd,vd->btv", x, tokens, preferred_element_type=jnp.float32)


# Products come in pairs: the first is sharded by its outputs, the second by its inputs.
PLACEMENT = (
    ("tokens", P("tensor", "fsdp")),
    ("positions", P(None, ("fsdp", "tensor"))),
    ("layers/{q,k,v,up}/kernel", P(None, "fsdp", "tensor")),
    ("layers/{q,k,v,up}/bias", P(None, "tensor")),
    ("layers/{o,down}/kernel", P(None, "tensor", "fsdp")),
    ("layers/{o,down}/bias", P()),
    ("layers/*_norm/*", P()),
    ("norm/*", P()),
)


def workload(config: GptConfig) -> Workload:
    """Return the workload of the decoder, with shapes in place of arrays."""
    model = Gpt(config)
    ids = jax.ShapeDtypeStruct((config.batch_size, config.length), jnp.int32)

    def apply(params: Any, batch: Any, *, train: bool, key: Any) -> Any:
        return model.apply({"params": params}, batch["ids"])

    def loss(logits: Array, batch: Any) -> Loss:
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return Loss(each.sum(), jnp.float32(each.size))

    def absent(_: Any) -> NoReturn:
        raise ConfigError(
            "there are no public weights of GPT-3 175B: it can only be planned, with --plan"
        )

    return Workload(
        apply=apply,
        loss=loss,
        params=jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), int)))[
            "params"
        ],
        train=absent,
        load=absent,
        example={"ids": ids, "targets": ids},
        placement=PLACEMENT,
    )


config = GptConfig(
    workload=workload,
    steps=1000,
    accumulate=2,
    lora=LoraConfig(rank=4, alpha=4.0, targets=("layers/{q,v}/kernel",)),
    optimizer=OptimizerConfig(learning_rate=2e-4, weight_decay=0.1),
    mesh=MeshConfig(data=-1, fsdp=8, tensor=8),
)
