"""Fine-tune a model with LoRA: one run, from the command line to the summary.

    python train.py                                        run configs/minilm_reviews.py
    python train.py --config configs/smollm2_definitions.py
    python train.py --steps 50 --lora.rank 4               set fields of the config
    python train.py --help                                 the main fields; --help-all lists all
    python train.py --dry-run                              take one step, and leave nothing
    python train.py --plan                                 plan the run without running it
    python train.py --from runs/earlier                    start a new run with an earlier adapter

If a run was stopped, the same command continues it. If the command is started on many machines at
once, they train one run together (docs/pods.md). LoRA itself is in `lora_jax`; one run, read top to
bottom, is `lora_jax/training/one_run.py`.

Exit status: 0 finished, 1 an error that was printed, 2 a command line that cannot be read,
130 stopped by Ctrl-C, 143 preempted (SIGTERM): the current step was finished and saved.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

import jax

from lora_jax.system import extras

if __name__ == "__main__" and (missing := extras.missing("train", "train.py")):
    sys.exit(f"error: {missing}")

from lora_jax import planner
from lora_jax.cli import train as command_line
from lora_jax.errors import told
from lora_jax.sweeps import loop as group
from lora_jax.sweeps import results
from lora_jax.sweeps.config import GroupConfig
from lora_jax.system import host_memory, program_cache, whole_files
from lora_jax.system.console import USER_ERRORS, Console, note, out_of_memory, quiet_storage, say
from lora_jax.training import directory, dry_run, mesh, one_run, processes, summary
from lora_jax.training.config import Config

ROOT = pathlib.Path(__file__).resolve().parent
DEFAULT = "configs/minilm_reviews.py"
LESS = (
    "Use a smaller batch (in a text config --data.batch-size and --data.eval-batch-size), split it "
    "into parts with --accumulate, or recompute more with --model.remat full. --plan tells what a "
    "run needs; the same command continues from the last checkpoint."
)


def main(arguments: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Run the command line, which `--help` calls `program`, and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    with quiet_storage():
        return run(arguments, program)


def run(arguments: Sequence[str], program: str) -> int:
    """Train, plan or train a group, as the command line says, and return the exit status."""
    try:
        host_memory.keep()
        name, config, planning = command_line.parse(arguments, DEFAULT, ROOT, program)
        if isinstance(config, GroupConfig):
            return train_group(name, config)
        if planning.plan:
            return show_plan(name, config, planning)
        processes.join(config.processes)
        processes.check_same(config)
        program_cache.enable(note)
        console = Console(quiet=not processes.first())
        if planning.dry_run:
            dry_run.run(config, console)
        else:
            summary.show(one_run.run(name, config, console), console)
    except processes.ElsewhereError:
        return 1
    except USER_ERRORS as error:
        say(Console(stderr=True, style="red"), f"error: {processes.name()}{told(error)}")
        return 1
    except processes.Preempted as stopped:
        console = Console(quiet=not processes.first())  # a group has its own
        say(console, f"SIGTERM: {stopped} is saved: the same command goes on from it.")
        return processes.PREEMPTED
    except KeyboardInterrupt:
        say(Console(), "Stopped. The last checkpoint is kept: the same command goes on from it.")
        return 130
    except Exception as error:
        if (lack := out_of_memory(error, LESS)) is None:
            raise
        say(Console(stderr=True, style="red"), f"error: {processes.name()}{lack}")
        return 1
    return 0


def train_group(name: str, config: GroupConfig) -> int:
    """Train many runs as one program, write the comparison of their results; return the status."""
    processes.join(config.processes)
    program_cache.enable(note)
    console, path = Console(), group.folder(name, config)
    grid, failed = mesh.make(config.mesh), None
    say(console, mesh.described(grid))
    with jax.set_mesh(grid):
        try:
            summaries = group.run(config, grid, path, console)
        except group.StoppedError as error:
            summaries, failed = error.summaries, error
    if summaries:
        results.show(summaries, console)
        results.write(path, summaries)
        say(console, f"{path}")
    if failed is not None:
        raise failed
    return 0


def show_plan(name: str, config: Config, options: planner.PlanOptions) -> int:
    """Plan the run and write only the plan; return the exit status."""
    run = directory.default(name, config)
    file = pathlib.Path(options.plan_file or run.with_name(f"{run.name}.plan.json"))
    whole_files.check_place(file)  # before the plan, which takes minutes
    made = planner.make(name, config, options)
    planner.write(made, file)
    say(Console(), f"{planner.text(made)}\n\n{file}")
    return 0


if __name__ == "__main__":
    processes.end(main)
