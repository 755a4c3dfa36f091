"""Compare finished runs: in which fields their configs differ, and which run is best."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from lora_jax.training import metrics
from lora_jax.training.config import INCIDENTAL, Config
from lora_jax.training.directory import Summary
from lora_jax.training.saved_files import read_config

_LARGEST = 1e15  # a number in a config that is compared as one


@dataclasses.dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    values: field -> value, for the fields in which the runs differ.
    curve: (step, `select`) of every evaluation on the validation split, including step 0.
    """

    name: str
    values: dict[str, Any]
    curve: tuple[tuple[int, float], ...]
    summary: Summary

    @property
    def select(self) -> str:
        """The score that picked its best adapter."""
        return str(self.summary["select"])

    @property
    def sign(self) -> int:
        """1 if a higher score is better, -1 if a lower one is."""
        return 1 if self.summary["better"] == "higher" else -1

    def score(self, split: str, when: str = "after") -> float | None:
        """Return `select` on a split, "before" or "after" training; None if it is not known."""
        value = self.summary[when].get(split, {}).get(self.select)
        return None if value is None or not math.isfinite(value) else float(value)

    @property
    def rank(self) -> float:
        """The validation score with a sign so that higher is better; -infinity if not known."""
        score = self.score("validation")
        return -math.inf if score is None else self.sign * score


@dataclasses.dataclass(frozen=True)
class Results:
    """The compared runs.

    varied: the fields in which they differ.
    tasks: whether they learn different things, so that their scores cannot be compared.
    """

    rows: tuple[ComparedRun, ...]
    varied: tuple[str, ...]
    tasks: bool

    @property
    def best(self) -> ComparedRun | None:
        """The run with the best validation score, the first of equal ones; None for tasks."""
        known = [row for row in self.rows if row.rank > -math.inf]
        return max(known, key=lambda row: row.rank) if known and not self.tasks else None

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits for which any score is known."""
        found = dict.fromkeys(split for row in self.rows for split in row.summary["after"])
        return tuple(s for s in found if any(row.score(s) is not None for row in self.rows))


def gather(summaries: Sequence[Summary]) -> Results:
    """Read the configs and metrics of finished runs, and compare them."""
    paths = [pathlib.Path(summary["run"]) for summary in summaries]
    configs = [flat(read_config(path)) for path in paths]
    fields = dict.fromkeys(field for config in configs for field in config)
    varied = [f for f in fields if any(c.get(f) != configs[0].get(f) for c in configs)]
    rows = tuple(
        ComparedRun(path.name, {f: config.get(f) for f in varied}, _curve(path, summary), summary)
        for path, config, summary in zip(paths, configs, summaries, strict=True)
    )
    data = any(f.startswith("data.") and f != "data.batch_size" for f in varied)
    tasks = data or len({(row.select, row.sign) for row in rows}) > 1
    return Results(rows, tuple(varied), tasks)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a config that decide the result, by dotted path."""
    skipped = {f.name for f in dataclasses.fields(Config) if f.metadata == INCIDENTAL}
    kept = {name: value for name, value in config.items() if name not in skipped}
    return {path: _comparable(value) for path, value in flatten_dict(kept, sep=".").items()}


def _comparable(value: Any) -> Any:
    """Return a value that can be counted, ordered and drawn, even if the file was edited."""
    if isinstance(value, list):
        return tuple(map(_comparable, value))
    number = type(value) in (int, float)
    drawn = not number or abs(value) <= _LARGEST  # so neither NaN nor infinity is
    return value if drawn and not isinstance(value, dict) else str(value)


def _curve(path: pathlib.Path, summary: Summary) -> tuple[tuple[int, float], ...]:
    lines = [line for line in metrics.read(path) if line.get("split") == "validation"]
    name = summary["select"]
    return tuple((line["step"], line[name]) for line in lines if line.get(name) is not None)
