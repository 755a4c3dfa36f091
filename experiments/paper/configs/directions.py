"""Which directions does an update have? Longer runs at three ranks (figures 3 and 4, Table 7).

Command:   python train.py --config experiments/paper/configs/directions.py    MiniLM
           python train.py --config experiments/paper/configs/directions.py:decoder
Hardware:  2 CPU cores; 3 GB of memory, `decoder` 4 GB
Minutes:   19 of processor time, `decoder` 18

Ranks 8 and 64 are for the figures, with two seeds (of SmolLM2 only rank 64 has two); ranks 4 and 64
are for the table. The adapters are on q and v. A begins at random, and what it learns must outgrow
its initial values before its directions show it. So these runs have more steps than the other
experiments, a higher learning rate, and the smaller of the usual initial values (loralib's). Ranks
8 and 64 share one alpha, as in the paper; with the same scale alpha / rank, rank 64 of MiniLM
diverges at this learning rate. Runs with the same seed see the same rows in the same order, but
their initial A are unrelated: their phi(8, 64) is 64 / d.

Result: phi(1, 1) of A, the mean over the layers, and the number of layers where it is above 0.5:

                    rank 8 against 64       two seeds of rank 64     by chance
    MiniLM    q     0.25    0 of  6          0.05    0 of  6          0.003
              v     0.51    3 of  6          0.20    0 of  6
    SmolLM2   q     0.51   17 of 30          0.05    0 of 30          0.002
              v     0.60   24 of 30          0.18    0 of 30

W_q of MiniLM's layer 3 is amplified by a factor of 18.8 at rank 4 and 2.2 at rank 64 (the paper,
GPT-3: 21.6 and 1.9), that of SmolLM2's layer 15 by 5.2 and 0.55.
"""

import dataclasses

from configs.sweep import base
from experiments.paper.configs import definitions
from lora_jax.sweeps.sweep import SweepConfig

config = encoder = SweepConfig(
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

# The same for a decoder, as the paper's figures show one.
decoder = SweepConfig(
    base=dataclasses.replace(
        definitions.config.base,
        lora=dataclasses.replace(definitions.config.base.lora, init="uniform"),
        optimizer=dataclasses.replace(definitions.config.base.optimizer, learning_rate=4e-3),
        steps=120,
        evaluate_every=120,
        checkpoint_every=60,
    ),
    cases=tuple(
        {"lora.rank": rank, "lora.alpha": min(4.0 * rank, 32.0), "seed": seed}
        for rank, seed in ((4, 0), (8, 0), (64, 0), (64, 1))
    ),
)
