"""Which rank? 1 to 64 on q, on q and v, and on all of attention (the paper's Tables 6 and 18).

Command:   python train.py --config configs/paper/rank.py
           python -m lora_jax.report RUN_DIR     with figures 3 and 4, and Table 7 of the best
Hardware:  2 CPU cores, 4 GB of memory

Fifteen settings, three seeds. The scale alpha / rank is 2 throughout. Rank 64 is there a second
time with the alpha of rank 8, as the paper has one alpha for all ranks: at a scale of 2 its update
is eight times as strong at the same learning rate.
"""

from configs.paper.matrices import ATTENTION
from configs.sweep import base
from lora_jax.training.group.sweep import SweepConfig

config = SweepConfig(
    base=base,
    cases=(
        *({"lora.rank": r, "lora.alpha": 2.0 * r} for r in (1, 2, 4, 8, 64)),
        {"lora.rank": 64, "lora.alpha": 16.0},
    ),
    grid={
        "lora.targets": (
            (ATTENTION.format("query"),),
            (ATTENTION.format("{query,value}"),),
            (ATTENTION.format("{query,key,value,output}"),),
        ),
        "seed": (0, 1, 2),
    },
)
