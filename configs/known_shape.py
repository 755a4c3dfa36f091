"""QLoRA on a well-known decoder of which only the shape is known, for planning only.

Command:   python train.py --plan --model llama3-8b --plan-devices 1
           python train.py --plan --model qwen3-32b --plan-device tpu-v5e --plan-devices 16
Hardware:  2 CPU cores for the plan
Minutes:   half of one for the plan; two with the compiler of a TPU
Result:    the plan: docs/plan.md

`--model` is a name in lora_jax/models/weights/known_shapes.py; an unknown name lists them.
"""

from lora_jax.data.config import DataConfig
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.config import LoraConfig, MeshConfig, OptimizerConfig
from lora_jax.training.text import ModelConfig, TextConfig

config = TextConfig(
    workload=causal_lm,
    model=ModelConfig(
        reference="shape:llama3-8b",
        scan_layers=True,
        remat="full",
        dtype="bfloat16",
        param_dtype="bfloat16",
        quantize="nf4",
        double_quantize=True,
        loss_chunk=256,
    ),
    data=DataConfig(eos="", max_length=2048, batch_size=8),
    lora=LoraConfig(rank=16, alpha=16.0, targets=("all-linear",)),
    optimizer=OptimizerConfig(learning_rate=2e-4),
    mesh=MeshConfig(data=1, fsdp=-1),
)
