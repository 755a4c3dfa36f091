"""Train one run: its config, workload, step, loop, metrics and checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_jax.system.extras import require

require("train", __name__)

if TYPE_CHECKING:
    from lora_jax.training.config import Config
    from lora_jax.training.finished_run import FinishedRun
    from lora_jax.training.open_run import Evaluated


def run(config: Config, evaluated: Evaluated | None = None, *, quiet: bool = False) -> FinishedRun:
    """Train a run to its end, as `train.py` does, and return it.

    A run that was stopped goes on, and one that is finished is only opened. The run directory is
    `config.run_dir`, or runs/<workload>-<hash of the fields that decide the result>.

    Args:
      config: the config of the run.
      evaluated: called after each evaluation with its step, the name of the split, and the scores.
      quiet: whether nothing is printed.

    Returns:
      The finished run.

    Raises:
      LoraError: the config, the data or the directory cannot be used, or a step is not finite.

    >>> import dataclasses, tempfile
    >>> from configs.own_model import config
    >>> short = dataclasses.replace(config, steps=20, evaluate_every=10, run_dir=tempfile.mkdtemp())
    >>> done = run(short, lambda step, split, scores: print(step, split), quiet=True)
    0 validation
    10 validation
    20 validation
    >>> done.best["step"], len(done.metrics), done.adapter().layout.targets[0].rank
    (20, 23, 2)
    """
    # Imported here, because the config files and most commands need none of it.
    from lora_jax.system.console import Console, quiet_storage
    from lora_jax.training import directory, one_run, processes
    from lora_jax.training.finished_run import FinishedRun

    processes.join(config.processes)
    processes.check_same(config)
    name, console = config.workload.__name__, Console(quiet=quiet or not processes.first())
    with quiet_storage():
        summary = one_run.run(name, config, console, evaluated)
    return FinishedRun(directory.default(name, config), summary)
