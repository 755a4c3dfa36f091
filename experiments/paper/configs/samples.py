"""How many examples? Four methods on 100, 1,000 and all examples (the paper's Table 16).

Command:   python train.py --config experiments/paper/configs/samples.py    LoRA
           python train.py --config experiments/paper/configs/samples.py:full      and the others
Hardware:  2 CPU cores, 4 GB of memory; `full` 12 GB, and 5 GB of disk
Minutes:   68 of processor time: 22 `full`, 18 each of the prefixes, 10 LoRA

Three sizes of the training split and three seeds: nine runs for each method, which are one group.
The methods and their sizes are as in experiments/paper/configs/methods.py, each at its middle
learning rate for every number of examples.

The 100 and the 1,000 examples are the first ones of the split, the same for every seed; the seed
decides the adapters, the head and the order. All runs take 150 steps of 8 rows: 12 passes over the
100 examples, 1.2 over the 1,000, an eighth of a pass over all 10,289. The better of two evaluations
on 256 rows is kept.

Result: test accuracy in per cent, mean and standard deviation of the three seeds, at a learning
rate that was not tuned for 100 examples.

                             100         1,000           all
    full              74.3 ± 0.3    79.5 ± 1.7    80.3 ± 1.2
    prefix_embedding  70.6 ± 2.2    74.1 ± 4.2    73.8 ± 1.3
    prefix_layer      72.5 ± 0.7    76.6 ± 1.6    78.5 ± 1.7
    lora              71.9 ± 0.1    79.0 ± 1.5    79.1 ± 3.0
"""

import dataclasses

from experiments.methods.config import MethodTextConfig
from experiments.paper.configs import methods
from lora_jax.sweeps.sweep import SweepConfig

EXAMPLES = (100, 1_000, None)


def _sweep(same: SweepConfig) -> SweepConfig:
    """Return the sweep of a method over the numbers of examples."""
    text = same.base
    assert isinstance(text, MethodTextConfig)
    rate = methods.LEARNING_RATES[text.method.name][1]
    base = dataclasses.replace(
        text,
        optimizer=dataclasses.replace(text.optimizer, learning_rate=rate),
        data=dataclasses.replace(text.data, eval_limit=256),
        evaluate_every=75,
    )
    grid = {"data.train_limit": EXAMPLES, "seed": methods.SEEDS}
    return SweepConfig(base=base, grid=grid, memory=same.memory, at_once=same.at_once)


config = lora = _sweep(methods.lora)
full = _sweep(methods.full)
prefix_embedding = _sweep(methods.prefix_embedding)
prefix_layer = _sweep(methods.prefix_layer)
