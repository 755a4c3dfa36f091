"""Kill each command that writes, at random moments, and check that its files are whole.

    python -m tests.faults --kills 200 --seed 1
    python -m tests.faults --kills 50 --only "export hf" group --out faults

Each scenario is killed `--kills` times with SIGKILL. After each kill, the files must be an earlier
whole state; in the end, they must have the same bits as after a run that was never killed. The
results are printed, and written to `--out`. The exit status is 1 if anything failed; the folder of
the runs is then kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile

from tests.faults.commands import SCENARIOS
from tests.faults.kills import Kills


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("faults"))
    options = parser.parse_args()
    folder, outcomes = pathlib.Path(tempfile.mkdtemp(prefix="lora-jax-faults-")), []
    for name in options.only:
        scenario = SCENARIOS[name](folder / name.replace(" ", "-"))
        outcomes.append(Kills(name, scenario, options.seed).run(options.kills))
        sys.stdout.write(f"{name}: {outcomes[-1]}\n")
        sys.stdout.flush()
    options.out.mkdir(parents=True, exist_ok=True)
    values = [dataclasses.asdict(outcome) for outcome in outcomes]
    (options.out / "summary.json").write_text(json.dumps(values, indent=2) + "\n")
    if any(outcome.failures for outcome in outcomes):
        sys.stdout.write(f"what failed is kept in {folder}\n")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
