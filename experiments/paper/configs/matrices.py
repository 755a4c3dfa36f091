"""Which matrices? One number of trained parameters on different matrices (the paper's Table 5).

Command:   python train.py --config experiments/paper/configs/matrices.py
Hardware:  2 CPU cores, 4 GB of memory
Minutes:   17 on two cores; 30 of processor time

Ten choices with 92,160 parameters each, three seeds: rank 20 on one attention matrix of each layer,
10 on two, 5 on all four, and the MLP, which the paper leaves open: 8 on one of its two matrices, 4
on both. The scale alpha / rank is 2 in all of them; other settings are as in configs/sweep.py.

Result: accuracy after training on 512 rows each, mean and standard deviation of the three seeds.

    rank, matrices       validation        test
    20 query             0.7441 (0.0000)   0.7734 (0.0135)
    20 key               0.7493 (0.0088)   0.7832 (0.0153)
    20 value             0.7539 (0.0020)   0.7943 (0.0133)
    20 output            0.7552 (0.0176)   0.7806 (0.0235)
    10 query, key        0.7454 (0.0011)   0.7949 (0.0090)
    10 query, value      0.7611 (0.0092)   0.7936 (0.0241)
     5 all of attention  0.7598 (0.0174)   0.7884 (0.0214)
     8 MLP up            0.7650 (0.0023)   0.7943 (0.0177)
     8 MLP down          0.7624 (0.0056)   0.7956 (0.0100)
     4 MLP up and down   0.7630 (0.0056)   0.7969 (0.0179)
"""

from configs.sweep import base
from lora_jax.sweeps.sweep import SweepConfig

ATTENTION = "bert/encoder/layer*/attention/{}/kernel"
MLP = "bert/encoder/layer*/mlp/{}/kernel"
# Rank and targets; every choice has 15,360 parameters in a layer.
CHOICES = (
    (20, ATTENTION.format("query")),
    (20, ATTENTION.format("key")),
    (20, ATTENTION.format("value")),
    (20, ATTENTION.format("output")),
    (10, ATTENTION.format("{query,key}")),
    (10, ATTENTION.format("{query,value}")),
    (5, ATTENTION.format("{query,key,value,output}")),
    (8, MLP.format("up")),
    (8, MLP.format("down")),
    (4, MLP.format("{up,down}")),
)

config = SweepConfig(
    base=base,
    cases=tuple(
        {"lora.rank": rank, "lora.alpha": 2.0 * rank, "lora.targets": (targets,)}
        for rank, targets in CHOICES
    ),
    grid={"seed": (0, 1, 2)},
)
