"""Which rank? 1 to 64 on q, on q and v, and on all of attention (the paper's Tables 6 and 18).

Command:   python train.py --config experiments/paper/configs/rank.py
           lora-jax report RUN_DIR     with figures 3 and 4, and Table 7 of the best
Hardware:  2 CPU cores, 6 GB of memory
Minutes:   29 on two cores; 52 of processor time

Fifteen settings, three seeds. The scale alpha / rank is 2 in all of them. Rank 64 is there a second
time with the alpha of rank 8, because the paper has one alpha for all ranks: at a scale of 2 its
update is eight times as strong at the same learning rate, and on all four matrices it diverges.

Result: accuracy in per cent, mean and standard deviation of the three seeds.

    matrices   rank  alpha   validation     test
    q             1      2    71.7 ± 1.9  75.8 ± 1.0
    q             2      4    71.7 ± 2.0  76.8 ± 0.7
    q             4      8    73.2 ± 1.0  77.1 ± 1.0
    q             8     16    74.0 ± 0.4  77.3 ± 1.0
    q            64    128    74.6 ± 1.0  78.5 ± 0.7
    q            64     16    73.8 ± 0.8  77.6 ± 0.8
    q+v           1      2    74.0 ± 0.6  77.5 ± 0.3
    q+v           2      4    75.1 ± 0.5  78.2 ± 1.9
    q+v           4      8    74.2 ± 1.0  78.8 ± 1.3
    q+v           8     16    75.7 ± 1.6  79.1 ± 3.0
    q+v          64    128    74.3 ± 2.3  77.3 ± 2.8
    q+v          64     16    75.8 ± 1.3  79.2 ± 1.8
    q+k+v+o       1      2    74.5 ± 1.0  78.1 ± 1.8
    q+k+v+o       2      4    74.8 ± 1.4  78.6 ± 1.5
    q+k+v+o       4      8    76.1 ± 1.5  78.6 ± 2.0
    q+k+v+o       8     16    76.2 ± 1.4  78.1 ± 1.7
    q+k+v+o      64    128   60.8 ± 10.3  65.4 ± 9.4
    q+k+v+o      64     16    76.5 ± 1.4  79.4 ± 2.5
"""

from configs.sweep import base
from experiments.paper.configs.matrices import ATTENTION
from lora_jax.sweeps.sweep import SweepConfig

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
