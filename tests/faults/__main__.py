"""Kill each command that writes, or fill its disk, at random moments, and check its files.

    python -m tests.faults kills --count 200 --seed 1
    python -m tests.faults kills --count 50 --only "export hf" group --out faults
    python -m tests.faults disks --count 20

`kills`: after each SIGKILL, the files must be an earlier whole state; in the end, they must have
the same bits as after a run that was never killed. `disks`: tests/faults/full_disk.py. The results
are printed, and written to `--out`. The exit status is 1 if anything failed; the folder of the runs
is then kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile

from tests.faults import full_disk
from tests.faults.commands import SCENARIOS
from tests.faults.kills import Kills


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fault", choices=("kills", "disks"))
    parser.add_argument("--count", type=int, default=20, help="of faults for each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("faults"))
    options = parser.parse_args()
    folder, outcomes = pathlib.Path(tempfile.mkdtemp(prefix="lora-jax-faults-")), []
    killed = options.fault == "kills"
    for name in options.only or (SCENARIOS if killed else full_disk.COMMANDS):
        place = folder / name.replace(" ", "-")
        if killed:
            found = Kills(name, SCENARIOS[name](place), options.seed).run(options.count)
        else:
            found = full_disk.fill(name, place, options.count, options.seed)
        outcomes.append(found)
        sys.stdout.write(f"{name}: {found}\n")
        sys.stdout.flush()
    options.out.mkdir(parents=True, exist_ok=True)
    values = [dataclasses.asdict(outcome) for outcome in outcomes]
    (options.out / f"{options.fault}.json").write_text(json.dumps(values, indent=2) + "\n")
    if any(outcome.failures for outcome in outcomes):
        sys.stdout.write(f"what failed is kept in {folder}\n")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
