"""Kill each command that writes, or fill its disk, at random moments, and check its files.

    python -m tests.faults --kills 200 --seed 1
    python -m tests.faults --kills 50 --only "export hf" group
    python -m tests.faults --disks 20 --only "export hf" import

Each scenario is killed `--kills` times with SIGKILL, or writes to `--disks` disks that are too
small (tmpfs, so this needs the right to mount). After each kill, the files must be an earlier whole
state; after a full disk, the error must be ours. In the end, they must have the same bits as after
a run that was never disturbed. The results are written to `--out`. The exit status is 1 if
anything failed; the folder of the runs is then kept.
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
    """Run the command line, and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0, help="of each scenario")
    parser.add_argument("--disks", type=int, default=0, help="full disks of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("faults"))
    options = parser.parse_args()
    folder, outcomes = pathlib.Path(tempfile.mkdtemp(prefix="lora-jax-faults-")), []
    for name in options.only:
        place = folder / name.replace(" ", "-")
        if options.kills:
            engine = Kills(name, SCENARIOS[name](place / "kills"), options.seed)
            outcomes.append(engine.run(options.kills))
        if options.disks and name in full_disk.COMMANDS:
            outcomes.append(full_disk.fill(name, place / "disks", options.disks, options.seed))
        sys.stdout.write("".join(f"{name}: {one}\n" for one in outcomes[-1:]))
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
