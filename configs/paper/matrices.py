"""Which matrices? The same number of trained numbers over other matrices (the paper's Table 5).

Command:   python train.py --config configs/paper/matrices.py
Hardware:  2 CPU cores, 2 GB of memory

Ten choices with 92,160 numbers each, three seeds: rank 20 on one attention matrix of each layer,
10 on two, 5 on all four, and what the paper left open, the MLP: 8 on one of its two matrices, 4 on
both. The scale alpha / rank is 2 throughout.

Not run yet in full.
"""

from lora_jax import models
from lora_jax.training.classification import classification
from lora_jax.training.config import LoraConfig, OptimizerConfig
from lora_jax.training.data.config import DataConfig
from lora_jax.training.group.sweep import SweepConfig
from lora_jax.training.text import ModelConfig, TextConfig

base = TextConfig(
    workload=classification,
    model=ModelConfig(reference=models.MINILM, pooling="mean"),
    data=DataConfig(
        source="reviews",
        text_fields=("text",),
        max_length=64,
        buckets=(24, 32, 48, 64),
        batch_size=8,
        eval_limit=512,
        test_limit=512,
    ),
    lora=LoraConfig(rank=8, alpha=16.0),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="linear", warmup=0.06),
    steps=150,
    evaluate_every=150,
    checkpoint_every=50,
    log_every=50,
)

ATTENTION = "bert/encoder/layer*/attention/{}/kernel"
MLP = "bert/encoder/layer*/mlp/{}/kernel"
# Rank and targets; every layer has 15,360 numbers.
CHOICES = (
    (20, ATTENTION.format("query")),
    (20, ATTENTION.format("key")),
    (20, ATTENTION.format("value")),
    (20, ATTENTION.format("output")),
    (10, ATTENTION.format("{query,key}")),
    (10, ATTENTION.format("{query,value}")),
    (5, ATTENTION.format("{query,key,value,output}")),
    (8, MLP.format("up")),
    (8, MLP.format("down")),
    (4, MLP.format("{up,down}")),
)

config = SweepConfig(
    base=base,
    cases=tuple(
        {"lora.rank": rank, "lora.alpha": 2.0 * rank, "lora.targets": (targets,)}
        for rank, targets in CHOICES
    ),
    grid={"seed": (0, 1, 2)},
)
