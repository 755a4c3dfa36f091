"""The scores of all cells, in one JSON file with a line for each cell.

The runs are gigabytes; this file is all that a report needs, and a cell that is in it is not run
again, so the tables may be made on several machines.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

from lora_jax.errors import LoraError
from lora_jax.report.run_files import SavedRun
from lora_jax.system import whole_files


class Scored(NamedTuple):
    """The result of one cell.

    validation, test: the losses after training; NaN or infinity if it diverged.
    accuracy: on the test split.
    trained: the number of trained parameters, in the new head too.
    gradient: the mean norm of the gradient over all steps.
    seconds: its share of the time that its program took, on a machine with other work.
    together: the number of cells in that program.
    """

    validation: float
    test: float
    accuracy: float
    trained: int
    gradient: float
    seconds: float
    together: int


class Results:
    """A file of results, key of a cell -> `Scored`."""

    def __init__(self, file: pathlib.Path) -> None:
        """Read the file, if there is one."""
        self.file, self.cells = file, dict[str, Scored]()
        if not file.is_file():
            return
        try:
            found = json.loads(file.read_text())
            self.cells = {key: Scored(*row) for key, row in found.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise LoraError(
                f"{file} cannot be read: {error}; restore it (git checkout), or name another "
                "folder with --out"
            ) from error

    def add(self, found: dict[str, Scored]) -> None:
        """Add results and write the file, completely or not at all."""
        self.cells |= found
        rows = sorted((key, [_short(x) for x in row]) for key, row in self.cells.items())
        lines = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows]
        whole_files.write(self.file, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def scored(run: SavedRun, seconds: float, together: int) -> Scored:
    """Return the result of a finished run."""
    assert run.summary is not None
    after = run.summary["after"]
    norms = [x["gradient_norm"] for x in run.lines if x.get("gradient_norm") is not None]
    return Scored(
        float(after["validation"]["loss"]),
        float(after["test"]["loss"]),
        float(after["test"]["accuracy"]),
        int(run.summary["adapter_parameters"] + run.summary["trainable_parameters"]),
        sum(norms) / max(len(norms), 1),
        seconds,
        together,
    )


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
