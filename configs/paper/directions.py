"""Which directions does an update have? Long runs at three ranks (figures 3 and 4, Table 7).

Command:   python train.py --config configs/paper/directions.py
Hardware:  2 CPU cores, 3 GB of memory
"""

import dataclasses

from configs.sweep import base
from lora_jax.training.group.sweep import SweepConfig

config = SweepConfig(
    base=dataclasses.replace(base, steps=300),
    cases=tuple({"lora.rank": r, "lora.alpha": 2.0 * r} for r in (4, 8, 64)),
    grid={"seed": (0, 1)},
)
