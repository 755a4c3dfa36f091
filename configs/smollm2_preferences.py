"""DPO on SmolLM2-135M-Instruct: the right definition of a word is better than that of another.

Command:   python -m experiments.conversations --out words
           python train.py --config configs/smollm2_conversations.py --run-dir runs/conversations
           python train.py --config configs/smollm2_preferences.py --from runs/conversations
Hardware:  2 CPU cores, 7 GB of memory
Minutes:   5.5
Result:    reward accuracy 0.93 on 96 pairs of the validation split, seed 0
"""

from lora_jax import models
from lora_jax.data.config import DataConfig
from lora_jax.training.config import LoraConfig, OptimizerConfig
from lora_jax.training.preferences import PreferenceConfig, preferences
from lora_jax.training.text import ModelConfig

config = PreferenceConfig(
    workload=preferences,
    model=ModelConfig(reference=models.SMOLLM2),
    data=DataConfig(
        source="words/pairs.jsonl",
        max_length=96,
        buckets=(96,),  # one length, compiled once
        batch_size=8,
        eval_batch_size=8,
        eval_limit=96,
    ),
    lora=LoraConfig(rank=8, alpha=32.0, targets=("layers*/attention/{q,v}/kernel",)),
    optimizer=OptimizerConfig(learning_rate=5e-4, schedule="linear", warmup=0.06),
    steps=60,
    evaluate_every=30,
    checkpoint_every=30,
)
