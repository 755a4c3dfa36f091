"""One cell of a table: a run of train.py with a method, a learning rate and a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs import sweep
from lora_jax.sweeps import config_fields
from lora_jax.training.config_json import identity, short_hash
from lora_jax.training.text import TextConfig

RATE, BATCH = "optimizer.learning_rate", "data.batch_size"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much each cell trains and how exactly it is scored.

    steps: steps of 8 reviews of at most 32 tokens. No review is seen twice.
    validation, test: the rows that choose the rate, and that the results are of.
    longer: by how many rates a grid may go on at an edge.
    """

    steps: int = 160
    validation: int = 256
    test: int = 512
    longer: int = 4


FULL, QUICK = Size(), Size(steps=16, validation=128, test=256, longer=1)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method: the fields of the config that it changes, and the rates that are tried first.

    changes: dotted path -> value.
    rates: neighbours in `grids.RATES`.
    """

    name: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    arm: the name of its method.
    config: its config, without a run directory.
    """

    arm: str
    rate: float
    seed: int
    config: TextConfig

    @property
    def key(self) -> str:
        """The name of its directory and its results: equal configs of two tables are one run."""
        return short_hash(identity(self.config))


def cell(arm: Arm, rate: float, seed: int, size: Size) -> Cell:
    """Return the cell of a method at a rate and a seed. All cells see as many examples."""
    base = sweep.base
    steps = size.steps * base.data.batch_size // arm.changes.get(BATCH, base.data.batch_size)
    config = dataclasses.replace(
        base,
        data=dataclasses.replace(
            base.data,
            max_length=32,
            buckets=(32,),
            eval_limit=size.validation,
            test_limit=size.test,
        ),
        steps=steps,
        evaluate_every=steps,
        checkpoint_every=steps,
        log_to=(),
        on_nonfinite="skip",
    )
    for path, value in {**arm.changes, RATE: rate, "seed": seed}.items():
        config = config_fields.with_field(config, path, value)
    return Cell(arm.name, rate, seed, config)
