"""Read and check the files in the directories of finished and unfinished runs."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from lora_jax.checkpoint import adapter_path, storage
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.system import regular_files
from lora_jax.training import metrics
from lora_jax.training.directory import Summary
from lora_jax.training.saved_files import read_config, read_summary

Scores = dict[str, dict[str, float]]  # split -> name -> number


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """The files of one run, read and checked.

    summary: the contents of summary.json with "run" set to `path`; None until the run has finished.
    error: the error that stopped the run, if one did.
    """

    path: pathlib.Path
    config: dict[str, Any]
    lines: list[metrics.Line]
    summary: Summary | None
    error: str | None

    @property
    def name(self) -> str:
        return self.path.name

    @functools.cached_property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return max((line["step"] for line in self.lines if "split" not in line), default=0)

    @property
    def steps(self) -> int:
        return int(self.config["steps"])

    @property
    def before(self) -> Scores:
        """The scores before the first step."""
        if self.summary is not None:
            return self.summary["before"]
        return self._scores(lambda step: step == 0)

    @property
    def after(self) -> Scores:
        """The scores of the best adapter; if the run has not finished, of the last evaluation."""
        if self.summary is not None:
            return self.summary["after"]
        return self._scores(lambda step: step > 0)

    def _scores(self, fits: Any) -> Scores:
        lines = [line for line in self.lines if "split" in line and fits(line["step"])]
        rest = ("step", "split")
        return {x["split"]: {n: v for n, v in x.items() if n not in rest} for x in lines}


def read(path: pathlib.Path) -> tuple[SavedRun, ...]:
    """Read the run in `path`, or all runs in the directories inside it."""
    path = pathlib.Path(os.path.realpath(path.expanduser()))  # resolve() fails at a circle
    if not path.is_dir():
        around = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, around)
        nearby = f"\nnearest in {path.parent}:\n{listed(near)}" if near else ""
        what = "it is a file" if path.exists() else "there is no such directory"
        raise LoraError(f"{path}: {what}; give the run directory of a train.py run{nearby}")
    if is_run(path):
        return (_read(path),)
    members = [folder for folder in sorted(path.iterdir()) if is_run(folder)]
    if not members and adapter_path.adapter_in(storage.folder_at(path)) is not None:
        raise LoraError(
            f"{path} is an adapter without a run: it has no scores to compare; give it alone"
        )
    if not members:
        inside = sorted(p.name for p in path.iterdir())
        raise LoraError(
            f"{path} is not a run directory of train.py and contains none: it has "
            f"{', '.join(inside[:10]) or 'nothing'}; expected config.json, metrics.jsonl and "
            "adapters, or directories with these in it"
        )
    return tuple(_read(folder) for folder in members)


def is_run(path: pathlib.Path) -> bool:
    """Return whether train.py has begun a run in `path`; config.json alone could be a model's."""
    return (path / "config.json").is_file() and any(
        (path / name).exists() for name in ("lock", "metrics.jsonl", "summary.json", "checkpoints")
    )


def _read(path: pathlib.Path) -> SavedRun:
    config, summary = read_config(path), None
    if (path / "summary.json").exists():
        summary = {**read_summary(path), "run": str(path)}
    error, said = path / "error.txt", None
    if error.exists():
        said = regular_files.read(error, LoraError).decode(errors="replace").strip()
    return SavedRun(path, config, metrics.read(path), summary, said)


def every(paths: Sequence[pathlib.Path]) -> tuple[SavedRun, ...]:
    """Read the runs in all these directories; a run that is found twice is returned once."""
    found = {run.path: run for path in paths for run in read(path)}
    return tuple(found.values())
