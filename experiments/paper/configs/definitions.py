"""Which matrices and which rank for a decoder? SmolLM2-135M writes the definition of a word.

Command:   python train.py --config experiments/paper/configs/definitions.py
Hardware:  2 CPU cores, 8 GB of memory
Minutes:   22 of processor time

Four choices of matrices with 11,520 parameters in every layer (the paper's Table 5), and three
ranks on q and v (Tables 6 and 18), with two seeds each. The scale alpha / rank is 4 in all of them.
The key and value projections of SmolLM2 have a third of the outputs that q has, so q and v do not
cost the same at the same rank.

Result: test loss per token, mean and standard deviation of the two seeds; 4.98 before training.

    matrices         rank      test
    q                  10    3.755 ± 0.030
    v                  15    3.378 ± 0.018
    q, v                6    3.401 ± 0.017
    q, k, v, o          3    3.366 ± 0.012
    q, v                1    3.578 ± 0.010
    q, v                8    3.399 ± 0.026
    q, v               64    3.346 ± 0.013
"""

import dataclasses

from configs import smollm2_definitions
from lora_jax.sweeps.sweep import SweepConfig

ATTENTION = "layers*/attention/{}/kernel"
# Rank and targets; every choice has 11,520 parameters in a layer.
CHOICES = (
    (10, ATTENTION.format("q")),
    (15, ATTENTION.format("v")),
    (6, ATTENTION.format("{q,v}")),
    (3, ATTENTION.format("{q,k,v,o}")),
)
RANKS = tuple((rank, ATTENTION.format("{q,v}")) for rank in (1, 8, 64))

config = SweepConfig(
    base=dataclasses.replace(
        smollm2_definitions.config,
        data=dataclasses.replace(
            smollm2_definitions.config.data, max_length=32, eval_limit=64, test_limit=128
        ),
        optimizer=dataclasses.replace(smollm2_definitions.config.optimizer, learning_rate=2e-3),
        steps=40,
        evaluate_every=40,
        checkpoint_every=40,
    ),
    cases=tuple(
        {"lora.rank": rank, "lora.alpha": 4.0 * rank, "lora.targets": (targets,)}
        for rank, targets in (*CHOICES, *RANKS)
    ),
    grid={"seed": (0, 1)},
)
