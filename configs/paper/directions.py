"""Which directions does an update have? Longer runs at three ranks (figures 3 and 4, Table 7).

Command:   python train.py --config configs/paper/directions.py
Hardware:  2 CPU cores, 3 GB of memory
Minutes:   17 of processor time

Ranks 8 and 64 with two seeds for the figures, rank 4 beside 64 for the table, on q and v. A begins
at random, and what is learned has to outgrow that before its directions are those of A: so there
are more and larger batches than in the other experiments, a higher learning rate, and the smaller
of the usual initial values (loralib's). Ranks 8 and 64 have one alpha, as in the paper: at one
scale, and this learning rate, rank 64 diverges.

Result: phi(1, 1) of rank 8 against 64 is 0.25 on q and 0.51 on v on average, above 0.5 in none and
in three of six layers (0.003 by chance); between two seeds of rank 64 0.05 and 0.20. W_q of layer 3
is amplified 18.8 times by rank 4 and 2.2 times by rank 64 (the paper, GPT-3: 21.6 and 1.9).
"""

import dataclasses

from configs.sweep import base
from lora_jax.training.group.sweep import SweepConfig

config = SweepConfig(
    base=dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, batch_size=16),
        lora=dataclasses.replace(base.lora, init="uniform"),
        optimizer=dataclasses.replace(base.optimizer, learning_rate=4e-3),
        steps=400,
        evaluate_every=400,
        checkpoint_every=200,
    ),
    cases=tuple(
        {"lora.rank": rank, "lora.alpha": min(2.0 * rank, 16.0), "seed": seed}
        for rank, seed in ((4, 0), (8, 0), (8, 1), (64, 0), (64, 1))
    ),
)
