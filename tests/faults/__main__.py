"""Kill each command that writes, at random moments, and check that its files are whole.

    python -m tests.faults --kills 200 --seed 1
    python -m tests.faults --kills 50 --only "export hf" group --out faults

Each scenario is killed `--kills` times with SIGKILL. After each kill, the files must be an earlier
whole state; in the end, they must have the same bits as after a run that was never killed. The
results are printed as a table, and written to `--out` as summary.json and summary.md. The exit
status is 1 if anything failed; the folder of the runs is then kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from tests.faults.commands import SCENARIOS
from tests.faults.kills import KINDS, Kills, Outcome

HEADER = ("what", "kills", "time / change / file", "half-written", "ends compared", "failed")


def main() -> int:
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("faults"))
    options = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="lora-jax-faults-"))
    outcomes = _outcomes(options.only, options.kills, options.seed, folder)
    text = table(outcomes)
    options.out.mkdir(parents=True, exist_ok=True)
    values = [dataclasses.asdict(outcome) for outcome in outcomes]
    (options.out / "summary.json").write_text(json.dumps(values, indent=2) + "\n")
    (options.out / "summary.md").write_text(text)
    sys.stdout.write(text)
    if any(outcome.failures for outcome in outcomes):
        sys.stdout.write(f"what failed is kept in {folder}\n")
        return 1
    shutil.rmtree(folder)
    return 0


def _outcomes(names: list[str], kills: int, seed: int, folder: pathlib.Path) -> list[Outcome]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    found = []
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        for name in names:
            task = bar.add_task(name, total=kills)
            scenario = SCENARIOS[name](folder / name.replace(" ", "-"))
            engine = Kills(name, scenario, seed)

            def told(task: TaskID = task, engine: Kills = engine) -> None:
                bar.advance(task)
                if not bar.console.is_terminal:
                    bar.console.print(f"{engine.outcome.name}: {engine.outcome.kills} kills")

            found.append(engine.run(kills, told))
            for failure in found[-1].failures:
                bar.console.print(f"{name}: {failure}", markup=False)
    return found


def table(outcomes: list[Outcome]) -> str:
    """Return the results as a markdown table."""
    rows = [HEADER, ("---",) * len(HEADER)]
    for one in outcomes:
        moments = " / ".join(str(one.moments.get(kind, 0)) for kind in KINDS)
        numbers = (one.kills, moments, one.torn, one.ends, len(one.failures))
        rows.append((one.name, *map(str, numbers)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
