"""Which rank and which learning rate? 16 runs of MiniLM on the movie reviews, as one program.

Command:   python train.py --config configs/sweep.py
Hardware:  2 CPU cores, 2 GB of memory
Minutes:   6.2 on two cores; 11 minutes of processor time
Result:    accuracy on 512 rows each of validation and test, 0.525 and 0.510 before training: from
           0.705 and 0.748 (rank 1, 5e-4) to 0.758 and 0.779 (rank 2, 4e-3); rank 8 at 4e-3 has the
           same validation accuracy. One standard error is 0.019

To vary other fields or values:

    python train.py --config configs/sweep.py --grid lora.alpha=4,16,64 lora.init=gaussian,uniform
    python train.py --config configs/sweep.py --grid seed=0,1,2,3,4 --base.steps 300

Every member is a run of `base` with the member's values, and its directory is the same as if it had
been trained alone. The folder of the sweep also gets results.csv, results.json and results.png.
"""

from lora_jax import models
from lora_jax.data.config import DataConfig
from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.training.classification import classification
from lora_jax.training.config import LoraConfig, OptimizerConfig
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
    lora=LoraConfig(
        rank=8, alpha=16.0, targets=("bert/encoder/layer*/attention/{query,value}/kernel",)
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="linear", warmup=0.06),
    steps=150,
    evaluate_every=150,
    checkpoint_every=50,
    log_every=50,
)

config = SweepConfig(
    base=base,
    grid={
        "lora.rank": (1, 2, 4, 8),
        "optimizer.learning_rate": (5e-4, 1e-3, 2e-3, 4e-3),
    },
)
