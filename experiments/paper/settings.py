"""Group runs that differ only in the seed, and compute their mean and standard deviation."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.shared.spreads import mean, spread, text
from lora_jax.report.run_files import SavedRun, is_run, read
from lora_jax.sweeps.comparison import flat


class Unit(NamedTuple):
    """The form in which a score is shown: its factor, and its number of decimals."""

    label: str
    factor: float
    decimals: int


PER_CENT = Unit("accuracy, %", 100.0, 1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Finished runs of one config with several seeds.

    config: dotted path -> value, without the seed.
    runs: one run for each seed.
    """

    config: dict[str, Any]
    runs: tuple[SavedRun, ...]

    @property
    def select(self) -> str:
        """The score that picked the best adapters."""
        summary = self.runs[0].summary
        assert summary is not None
        return str(summary["select"])

    @property
    def unit(self) -> Unit:
        """The form in which that score is shown."""
        return PER_CENT if self.select == "accuracy" else Unit(self.select, 1.0, 3)

    def shown(self, split: str) -> list[float]:
        """Return the scores of a split in this unit."""
        return [self.unit.factor * value for value in self.scores(split)]

    def text(self, split: str) -> str:
        """Format the mean and standard deviation of a split in this unit."""
        return text(self.scores(split), self.unit.factor, self.unit.decimals)

    def scores(self, split: str, name: str | None = None) -> list[float]:
        """Return a score after training, of each run that has it.

        `name` is the score; None is the one that picked the best adapter.
        """
        found = []
        for run in self.runs:
            value = run.after.get(split, {}).get(name or self.select)
            if value is not None and math.isfinite(value):
                found.append(float(value))
        return found

    def mean(self, split: str, name: str | None = None) -> float:
        """Return the mean over the seeds; NaN if there is none."""
        return mean(self.scores(split, name))

    def spread(self, split: str, name: str | None = None) -> float:
        """Return the standard deviation over the seeds; NaN for fewer than two."""
        return spread(self.scores(split, name))

    @property
    def trained(self) -> int:
        """The number of trained parameters, also in a new head."""
        summary = self.runs[0].summary
        assert summary is not None
        return int(summary["adapter_parameters"] + summary["trainable_parameters"])


def settings(runs: Sequence[SavedRun]) -> list[Setting]:
    """Group the finished runs by their configs, in the order of the first run of each."""
    found: dict[tuple[Any, ...], list[SavedRun]] = {}
    for run in runs:
        if run.summary is not None:
            config = flat(run.config)
            config.pop("seed", None)
            found.setdefault(tuple(config.items()), []).append(run)
    return [Setting(dict(key), tuple(saved)) for key, saved in found.items()]


def there(folder: pathlib.Path) -> tuple[SavedRun, ...]:
    """Read the runs in a folder and in its folders; none if there are none yet."""
    if not folder.is_dir():
        return ()
    if is_run(folder):
        return read(folder)
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    return tuple(run for path in inner for run in there(path))


def matrices(setting: Setting) -> tuple[str, ...]:
    """Return the matrices of a layer that the targets name, in the order of the patterns.

    >>> matrices(Setting({"lora.targets": ("bert/layer*/attention/{query,value}/kernel",)}, ()))
    ('query', 'value')
    """
    found: dict[str, None] = {}
    for pattern in setting.config["lora.targets"]:
        segments = pattern.removesuffix("/kernel").split("/")
        found |= dict.fromkeys(segments[-1].strip("{}").split(","))
    return tuple(found)
