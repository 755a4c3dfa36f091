"""LoRA or another method? All of docs/methods.md at matched parameters (the paper's Tables 2, 3).

Command:   python train.py --config configs/paper/methods.py            LoRA
           python train.py --config configs/paper/methods.py:bitfit     and so with every other
Hardware:  2 CPU cores, 4 GB of memory; `full` 9 GB, and 5 GB of disk
Minutes:   TO BE FILLED IN

Eleven methods, each with a grid of three learning rates, three seeds: nine runs each, which are a
group of their own. The validation split picks the learning rate, the test split says what it is
worth. All else is as in configs/sweep.py.

LoRA with rank 8 on q and v trains 73,728 numbers. The other methods have what their formulae allow
that is nearest to it, without the 770 of the new head:

    lora              73,728   rank 8 on q and v
    prefix_layer      73,728   32 learned tokens
    adapter_drop      74,975   size 19, all layers but the first
    pfeiffer          71,514   size 15
    lin               71,508   size 14
    houlsby           69,960   size 6
    bitfit            25,728   there are no more biases
    prefix_embedding  12,288   32 learned tokens: 192 would be three times as long as the texts
    head                   0
    top_layers     3,548,928   two layers
    full          22,565,376
"""

import dataclasses

from configs.sweep import base
from lora_jax.training.group.sweep import SweepConfig
from lora_jax.training.method import MethodConfig

SEEDS = (0, 1, 2)
# Method -> its grid, low to high, each a factor of 2 to 3.3 above the one before.
LEARNING_RATES = {
    "lora": (1e-3, 2e-3, 4e-3),
    "full": (3e-5, 1e-4, 3e-4),
    "top_layers": (1e-4, 3e-4, 1e-3),
    "bitfit": (1e-3, 3e-3, 1e-2),
    "head": (1e-2, 3e-2, 1e-1),  # of 1e-3 to 3e-2 the last was best on validation, with one seed
    "houlsby": (1e-3, 2e-3, 4e-3),
    "pfeiffer": (1e-3, 2e-3, 4e-3),
    "adapter_drop": (1e-3, 2e-3, 4e-3),
    "lin": (1e-3, 2e-3, 4e-3),
    "prefix_embedding": (1e-2, 3e-2, 1e-1),
    "prefix_layer": (3e-3, 1e-2, 3e-2),
}


def _sweep(
    method: MethodConfig, memory: float | None = None, at_once: int | None = None
) -> SweepConfig:
    rates = LEARNING_RATES[method.name]
    return SweepConfig(
        base=dataclasses.replace(base, method=method),
        grid={"optimizer.learning_rate": rates, "seed": SEEDS},
        memory=memory,
        at_once=at_once,
    )


config = lora = _sweep(MethodConfig("lora"))
# Three members at a time, one after the other through the model: all nine at once take 14 GB.
full = _sweep(MethodConfig("full"), memory=3.5e9, at_once=1)
top_layers = _sweep(MethodConfig("top_layers", top_layers=2))
bitfit = _sweep(MethodConfig("bitfit"))
head = _sweep(MethodConfig("head"))
houlsby = _sweep(MethodConfig("houlsby", size=6))
pfeiffer = _sweep(MethodConfig("pfeiffer", size=15))
adapter_drop = _sweep(MethodConfig("adapter_drop", size=19, drop=1))
lin = _sweep(MethodConfig("lin", size=14))
prefix_embedding = _sweep(MethodConfig("prefix_embedding", prefix=16, infix=16))
prefix_layer = _sweep(MethodConfig("prefix_layer", prefix=16, infix=16))
