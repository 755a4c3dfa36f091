"""QLoRA on Llama 3 70B, r=16 on all linear layers, for planning only.

Command:   python train.py --config configs/llama3_70b.py --plan --plan-devices 1
           python train.py --config configs/llama3_70b.py --plan --plan-devices 8 --accumulate 1
Hardware:  2 CPU cores for the plan; one GPU of 80 GB for the run
Minutes:   half of one for the plan
Result:    one device: 39.5 GB of weights, 2.5 GB of adapters and optimizer, 8.0 GB of activations
           and temporaries, 50.0 GB in all; eight devices: 12.2 GB each (docs/plan.md)

The shapes are Meta's: 80 layers, width 8192, 64 heads of 128, 8 of them for keys and values, an MLP
of 28672, 128256 tokens, an untied output head. Base weights are NF4 with double quantisation;
embeddings, norms and the output head stay in bfloat16. The weights are not read, so the run can
only be planned.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NoReturn

import jax.numpy as jnp

from lora_jax import models
from lora_jax.models import placement
from lora_jax.training.causal_lm import apply_of, batch_shapes, token_loss
from lora_jax.training.config import Config, ConfigError, LoraConfig, MeshConfig, OptimizerConfig
from lora_jax.training.quantised import quantised
from lora_jax.training.workload import Workload


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaPlanConfig(Config):
    """The sizes of the model and of a batch, and the form of the base weights."""

    layers: int = 80
    """Decoder layers, which are scanned."""
    hidden: int = 8192
    """Width of the model. Each head has a width of 128."""
    kv_heads: int = 8
    """Heads for keys and values."""
    mlp: int = 28_672
    """Width of the MLP."""
    vocabulary: int = 128_256
    """Size of the vocabulary."""
    rows: int = 8
    """Rows of a batch."""
    length: int = 2048
    """Tokens of a row."""
    loss_chunk: int = 256
    """Positions of a row whose logits exist at the same time."""
    quantize: Literal["none", "nf4", "int4", "int8", "fp8"] = "nf4"
    """How the weights of the layers are kept. none: in bfloat16."""
    double_quantize: bool = True
    """Quantise the scales of nf4, too."""

    @property
    def model(self) -> models.DecoderConfig:
        """The config of the model itself."""
        heads = self.hidden // 128
        return models.DecoderConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=heads,
            num_kv_heads=self.kv_heads,
            head_dim=128,
            mlp_size=self.mlp,
            max_positions=8192,
            rope_theta=500_000.0,
            tied=False,
            scan_layers=True,
            remat="full",
            dtype=jnp.dtype("bfloat16"),
            param_dtype=jnp.dtype("bfloat16"),
        )

    def full_fine_tuning(self, **changes: Any) -> Config:
        """See `Config`. A quantised weight cannot be trained."""
        return super().full_fine_tuning(quantize="none", **changes)


def workload(config: LlamaPlanConfig) -> Workload:
    """Return the workload of the decoder, with shapes in place of arrays."""

    def absent(_: Any) -> NoReturn:
        raise ConfigError("configs/llama3_70b.py reads no weights: it can only be planned (--plan)")

    floats = Workload(
        apply=apply_of(models.DecoderModel(config.model), config.loss_chunk),
        loss=token_loss,
        params=models.shapes(config.model),
        train=absent,
        load=absent,
        example=batch_shapes(config.rows, config.length),
        placement=placement.rules(config.model),
    )
    if config.quantize == "none":
        return floats
    double = config.double_quantize and config.quantize == "nf4"
    return quantised(floats, config.quantize, double=double)


config = LlamaPlanConfig(
    workload=workload,
    steps=1000,
    accumulate=8,
    lora=LoraConfig(rank=16, alpha=16.0, targets=("all-linear",)),
    optimizer=OptimizerConfig(learning_rate=2e-4),
    mesh=MeshConfig(data=1, fsdp=-1),
)
