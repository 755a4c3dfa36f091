"""Read and check the files in run directories, of finished and of unfinished runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from lora_jax.checkpoint import adapter_path, storage
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.training import metrics
from lora_jax.training.config_json import upgrade
from lora_jax.training.directory import Summary

Scores = dict[str, dict[str, float]]  # split -> name -> number

# What is read of a summary.json: name -> what it has to be.
_NUMBER = (int, float)
_SUMMARY: dict[str, Any] = {
    **dict.fromkeys(("steps", "skipped_steps", "base_parameters", "adapter_parameters"), _NUMBER),
    **dict.fromkeys(("trainable_parameters", "adapter_file_bytes", "optimizer_bytes"), _NUMBER),
    **dict.fromkeys(("full_checkpoint_bytes", "base_bytes_per_device"), _NUMBER),
    **dict.fromkeys(("peak_memory_bytes", "steps_per_second"), _NUMBER),
    "merged_difference": (*_NUMBER, type(None)),  # None over a quantised base
    **dict.fromkeys(("compile_seconds", "total_seconds"), _NUMBER),
    **dict.fromkeys(("before", "after"), dict),
    **dict.fromkeys(("select", "better"), str),
    "best_step": (int, type(None)),
}


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """The files of one run, read and checked.

    config: config.json.
    lines: metrics.jsonl.
    summary: summary.json, its "run" being `path`; None if the run has not finished.
    error: why it has stopped, if it has.
    """

    path: pathlib.Path
    config: dict[str, Any]
    lines: list[metrics.Line]
    summary: Summary | None
    error: str | None

    @property
    def name(self) -> str:
        """That of its directory."""
        return self.path.name

    @functools.cached_property
    def step(self) -> int:
        """The last step in the record."""
        return max((line["step"] for line in self.lines if "split" not in line), default=0)

    @property
    def steps(self) -> int:
        """How many it is to take."""
        return int(self.config["steps"])

    @property
    def before(self) -> Scores:
        """What the model scored before the first step."""
        if self.summary is not None:
            return self.summary["before"]
        return self._scores(lambda step: step == 0)

    @property
    def after(self) -> Scores:
        """What the best adapter scored; of a run that has not finished, its last evaluation."""
        if self.summary is not None:
            return self.summary["after"]
        return self._scores(lambda step: step > 0)

    def _scores(self, fits: Any) -> Scores:
        found: Scores = {}
        for line in self.lines:
            if "split" in line and fits(line["step"]):
                numbers = {n: v for n, v in line.items() if n not in ("step", "split")}
                found[line["split"]] = numbers
        return found


def read(path: pathlib.Path) -> tuple[SavedRun, ...]:
    """The run in `path`, or the runs in the directories in it.

    Raises:
      LoraError: there is none, or what it has left cannot be read.
    """
    path = path.expanduser().resolve()
    if not path.is_dir():
        around = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = nearest(path.name, around)
        beside = f"\nnearest in {path.parent}:\n{listed(near)}" if near else ""
        what = "it is a file" if path.exists() else "there is no such directory"
        raise LoraError(f"{path}: {what}; give the run directory of a train.py run{beside}")
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
            f"{path} is no run directory of train.py, and holds none: it has "
            f"{', '.join(inside[:10]) or 'nothing'}; expected config.json, metrics.jsonl and "
            "adapters, or directories with these in it"
        )
    return tuple(_read(folder) for folder in members)


def is_run(path: pathlib.Path) -> bool:
    """Whether train.py has begun a run in `path`: its config.json alone could be a model's."""
    return (path / "config.json").is_file() and any(
        (path / name).exists() for name in ("lock", "metrics.jsonl", "summary.json", "checkpoints")
    )


def _read(path: pathlib.Path) -> SavedRun:
    config = _json(path / "config.json", "it was written by train.py; take it from a copy")
    if not isinstance(config.get("steps"), int) or not isinstance(config.get("lora"), dict):
        raise LoraError(f"{path / 'config.json'} is no config of train.py: no steps and lora in it")
    summary = None
    if (path / "summary.json").is_file():
        summary = {**_summary(path / "summary.json"), "run": str(path)}
    error = path / "error.txt"
    said = error.read_text().strip() if error.is_file() else None
    return SavedRun(path, config, _lines(path), summary, said)


def _lines(path: pathlib.Path) -> list[metrics.Line]:
    try:
        lines = metrics.read(path)
        whole = all(isinstance(line, dict) and isinstance(line["step"], int) for line in lines)
    except (ValueError, KeyError) as error:
        raise LoraError(
            f"{path / 'metrics.jsonl'} cannot be read: {error}; delete the line that is damaged"
        ) from error
    if not whole:
        raise LoraError(f"{path / 'metrics.jsonl'} is no record of train.py: lines without a step")
    return lines


def _summary(file: pathlib.Path) -> Summary:
    """The summary, with everything in it that the report reads."""
    cure = (
        "delete it and start the command of the run again: it goes on from its last checkpoint, "
        "and writes it anew"
    )
    found = _json(file, cure)
    for name, kind in _SUMMARY.items():
        if name not in found:
            raise LoraError(f"{file} has no {name!r}; {cure}")
        if not isinstance(found[name], kind):
            raise LoraError(f"{file}: {name!r} is {str(found[name])[:80]!r}; {cure}")
    for when in ("before", "after"):
        if not all(_are_scores(scores) for scores in found[when].values()):
            raise LoraError(f"{file}: {when!r} holds something else than numbers; {cure}")
    if not any(n.endswith("_per_second") and not n.startswith("steps_") for n in found):
        raise LoraError(f"{file} has no speed but steps_per_second; {cure}")
    return found


def _are_scores(scores: Any) -> bool:
    return isinstance(scores, dict) and all(
        value is None or isinstance(value, _NUMBER) for value in scores.values()
    )


def _json(file: pathlib.Path, cure: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise LoraError(f"{file} cannot be read: {error}; {cure}") from error
    if not isinstance(found, dict):
        raise LoraError(f"{file} holds no fields; {cure}")
    return upgrade(found)


def every(paths: Sequence[pathlib.Path]) -> tuple[SavedRun, ...]:
    """What is in all of these directories; a run that is named twice is there once."""
    found = {run.path: run for path in paths for run in read(path)}
    return tuple(found.values())
