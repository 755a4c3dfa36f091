"""Files that `tests.formats.make` wrote. Once released, a format's folder is never made again."""

import pathlib

HERE = pathlib.Path(__file__).parent
V1 = HERE / "v1"
RUNS = V1 / "run_directories"
# The names end with a hash of the config, so that the commands of `small` find them.
SWEEP = next(RUNS.glob("small-sweep-*"), RUNS / "no-sweep")
RUN = next(iter(set(RUNS.glob("small-*")) - {SWEEP}), RUNS / "no-run")
