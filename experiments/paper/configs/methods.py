"""LoRA or another method? All methods of docs/methods.md at matched parameters (Tables 2 and 3).

Command:   python train.py --config experiments/paper/configs/methods.py    LoRA
           python train.py --config experiments/paper/configs/methods.py:bitfit    and the others
Hardware:  2 CPU cores, 4 GB of memory; `full` 12 GB, and 5 GB of disk
Minutes:   107 of processor time for all: 4 (head) to 21 (full), 8 for LoRA

Eleven methods, each with a grid of three learning rates and three seeds: nine runs, which are one
group. The validation split picks the learning rate, the test split measures the result. Other
settings are as in configs/sweep.py.

LoRA with rank 8 on q and v trains 73,728 parameters. The other methods have the nearest number that
their formulas allow, not counting the 770 parameters of the new head:

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

Result: accuracy in per cent at the learning rate with the best validation accuracy, mean and
standard deviation of the three seeds; * is the end of a grid. The trained parameters include the
head.

    method                trained   learning rate validation      test
    full               22,566,146   0.0003  *  77.0 ± 0.5    79.6 ± 1.5
    top_layers          3,549,698   0.0003     75.3 ± 0.8    77.1 ± 0.7
    bitfit                 26,498   0.003      74.4 ± 1.4    79.4 ± 0.6
    head                      770   0.03       74.0 ± 0.7    74.1 ± 2.4
    houlsby                70,730   0.004   *  77.0 ± 0.8    79.3 ± 0.3
    pfeiffer               72,284   0.004   *  75.9 ± 0.1    78.9 ± 1.0
    adapter_drop           75,745   0.002      75.5 ± 0.9    77.7 ± 1.8
    lin                    72,278   0.004   *  75.9 ± 0.8    78.9 ± 0.6
    prefix_embedding       13,058   0.01    *  72.9 ± 0.2    77.4 ± 0.6
    prefix_layer           74,498   0.01       73.6 ± 1.1    78.5 ± 1.7
    lora                   74,498   0.004   *  76.3 ± 0.7    79.6 ± 2.0
"""

from configs.sweep import base
from experiments.methods.config import MethodConfig, MethodTextConfig
from lora_jax.sweeps.sweep import SweepConfig

SEEDS = (0, 1, 2)
# Method -> its grid, ascending; each rate is 2 to 3.3 times the one before.
LEARNING_RATES = {
    "lora": (1e-3, 2e-3, 4e-3),
    "full": (3e-5, 1e-4, 3e-4),
    "top_layers": (1e-4, 3e-4, 1e-3),
    "bitfit": (1e-3, 3e-3, 1e-2),
    "head": (1e-2, 3e-2, 1e-1),  # 3e-2 was the best of 1e-3 to 3e-2 on validation, with one seed
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
        base=MethodTextConfig.like(base, method=method),
        grid={"optimizer.learning_rate": rates, "seed": SEEDS},
        memory=memory,
        at_once=at_once,
    )


config = lora = _sweep(MethodConfig("lora"))
# Three members in memory, one after the other through the model: all nine at once take 14 GB.
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
