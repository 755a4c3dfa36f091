"""Train four tasks on one MiniLM together and one by one: memory, time, and equal results.

    python -m benchmarks.multitask                  50 steps of each task, few rows evaluated
    python -m benchmarks.multitask --steps 300 --rows 1024

Every run is a command of `train.py`, which is printed: configs/multitask.py, and each of its tasks
alone. For each task it prints the gap between the parameters trained alone and together: the norm
of the difference relative to the whole and, in brackets, the largest difference of a single number.
For comparison it prints the gap between the first task alone on one device and on two, which comes
from rounding only. Then it prints memory and time of the whole: four processes at once would need
the sum of their memory, and one after the other they take the sum of their times. Start-up and
compilation are included.
"""

import argparse
import pathlib
import tempfile

from benchmarks import commands, common

CONFIG = "configs/multitask.py"


def settings(prefix: str, steps: int, rows: int) -> list[str]:
    """Return the options for steps and rows of a task, whose fields begin with `prefix`."""
    values = {"steps": steps, "evaluate-every": steps, "checkpoint-every": steps}
    values |= {"data.eval-limit": rows, "data.test-limit": rows}
    return [word for name, v in values.items() for word in (f"--{prefix}{name}", str(v))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Four tasks together and one after another.")
    parser.add_argument("--steps", type=int, default=50, help="steps of each task")
    parser.add_argument("--rows", type=int, default=128, help="rows evaluated of each split")
    args = parser.parse_args()
    names = [m.name for m in commands.members(CONFIG)]
    print(commands.load(), flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        options = [w for n in names for w in settings(f"{n}.", args.steps, args.rows)]
        mix = commands.train("--config", CONFIG, "--run-dir", str(folder / "mix"), *options)
        alone = {}
        for name in names:
            where = ("--config", f"{CONFIG}:{name}", "--run-dir", str(folder / name))
            alone[name] = commands.train(*where, *settings("", args.steps, args.rows))
        where = ("--config", f"{CONFIG}:{names[0]}", "--run-dir", str(folder / "two"))
        commands.train(*where, *settings("", args.steps, args.rows), devices=2)
        yardstick = commands.gap(folder / names[0], folder / "two")
        rows = []
        for name, spent in alone.items():
            gap = commands.gap(folder / name, folder / "mix" / name)
            losses = [
                commands.summary(f / name)["last_validation"]["loss"]
                for f in (folder, folder / "mix")
            ]
            rows.append(
                (name, str(gap), *(f"{x:.6f}" for x in losses))
                + (f"{spent.bytes / 1e6:.0f}", f"{spent.seconds:.0f}", f"{spent.processor:.0f}")
            )
    print(f"\n{common.hardware()}\n{commands.load()}\n{args.steps} steps of each task\n")
    print(f"for comparison, {names[0]} alone on one device and on two: {yardstick}\n")
    titles = ("task", "gap: norm (largest)", "validation loss alone", "in the mix")
    print(common.table((*titles, "MB", "s", "processor s"), rows))
    sums = [sum(getattr(s, n) for s in alone.values()) for n in ("bytes", "seconds", "processor")]
    mine = [mix.bytes, mix.seconds, mix.processor]
    print(
        "\n"
        + common.table(
            ("", "peak memory, MB", "s", "processor s"),
            [
                ("alone, together", f"{sums[0] / 1e6:.0f}", f"{sums[1]:.0f}", f"{sums[2]:.0f}"),
                ("the mix", f"{mine[0] / 1e6:.0f}", f"{mine[1]:.0f}", f"{mine[2]:.0f}"),
                ("ratio", *(f"{x / y:.2f}" for x, y in zip(mine, sums, strict=True))),
            ],
        )
    )


if __name__ == "__main__":
    main()
