"""Fine-tune a model with LoRA: one run, from the command line to the summary.

    python train.py                                        configs/minilm_reviews.py
    python train.py --config configs/smollm2_definitions.py
    python train.py --steps 50 --lora.rank 4               any field of the config
    python train.py --help                                 all of them

The same command goes on with a run that was stopped. No LoRA algebra is in here: `lora_jax` does
that, and `lora_jax.training` holds the parts.
"""

from __future__ import annotations

import logging
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from rich.console import Console

import lora_jax
from lora_jax import models
from lora_jax.training import command, curves, directory, export, optimizer, step, summary
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.config import Config
from lora_jax.training.evaluation import merged_difference
from lora_jax.training.loop import Loop, Setup

ROOT = pathlib.Path(__file__).resolve().parent
DEFAULT = "configs/minilm_reviews.py"
# What a user can put right; anything else is a fault of the program and shows its traceback.
USER_ERRORS = (
    lora_jax.LoraError,
    models.ConfigError,
    models.WeightsError,
    models.source.ReferenceError,
    models.packages.PackageError,
    FileNotFoundError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of parts without arrays
    console = Console()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        name, config = command.parse(arguments, DEFAULT, ROOT)
        with directory.enter(name, config) as path:
            finished = directory.summary(path)
            if finished is not None:
                say(console, f"{path} is finished; --fresh deletes it and starts again.")
            else:
                finished = train(config, path, console)
        summary.show(finished, console)
    except USER_ERRORS as error:
        say(Console(stderr=True, style="red"), f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say(console, "Stopped. The last checkpoint is kept: the same command goes on from it.")
        return 130
    return 0


def train(config: Config, path: pathlib.Path, console: Console) -> summary.Summary:
    """One run in the directory `path`, from the beginning or from its last checkpoint."""
    began = time.monotonic()

    # ---- the model and the data
    workload = config.workload(config)
    params = workload.arrays()
    data = workload.train()
    beginning = data.get_state()
    example = next(data)
    data.set_state(beginning)

    # ---- what is trained: adapters on the targets, and a few base parameters beside them
    key = jax.random.key(config.seed)
    layout = lora_jax.resolve(
        config.lora.spec, workload.apply, params, example, train=True, key=key
    )
    patterns = workload.beside if config.lora.beside is None else config.lora.beside
    base, frozen = lora_jax.frozen.split(params, patterns)
    step.check_apart(layout, base)
    base = jax.tree.map(jnp.copy, base)  # the step donates its state; `params` keeps its own
    trained = {"adapters": lora_jax.init(key, layout), "base": base}
    tx = optimizer.optimizer(config.optimizer, config.steps)
    state = step.create(trained, tx, key)
    setup = Setup(config, workload, layout, tx, frozen, path, began)
    del params, base, trained  # what is trained lives in the state, the rest in `frozen`

    # ---- the run
    with (
        Checkpoints(path / "checkpoints") as checkpoints,
        Loop(setup, state, data, checkpoints, console) as loop,
    ):
        say(console, summary.opening(loop))
        if loop.start == 0:
            loop.evaluate_before()
        for n in loop.steps():
            loop.take(n)
            if n % config.evaluate_every == 0 or n == config.steps:
                loop.validate(n)
            if n % config.checkpoint_every == 0 or n == config.steps:
                loop.checkpoint(n)
        loop.finish()

        # ---- what it came to
        best = export.load(path, "best" if loop.notes.best else "last")
        tested = loop.judge_best(config.steps, best)
        difference = merged_difference(workload, layout, best, frozen, example)
    finished = summary.summarise(loop, tested, difference)
    curves.draw(path)
    directory.write_json(path / "summary.json", finished)
    return finished


def say(console: Console, text: str) -> None:
    """Print plain text."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
