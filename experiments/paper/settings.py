"""Group runs that differ in the seed alone, and give their mean and standard deviation."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_jax.groups.comparison import flat
from lora_jax.report import formatting
from lora_jax.report.run_files import SavedRun, is_run, read


class Unit(NamedTuple):
    """How a score is shown: times `factor`, with so many decimals."""

    label: str
    factor: float
    decimals: int


PER_CENT = Unit("accuracy, %", 100.0, 1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Finished runs of one config with several seeds.

    config: dotted path -> value, without the seed.
    """

    config: dict[str, Any]
    runs: tuple[SavedRun, ...]

    @property
    def select(self) -> str:
        """The number that picked the best adapters."""
        summary = self.runs[0].summary
        assert summary is not None
        return str(summary["select"])

    @property
    def unit(self) -> Unit:
        """How that number is shown."""
        return PER_CENT if self.select == "accuracy" else Unit(self.select, 1.0, 3)

    def shown(self, split: str) -> list[float]:
        """The scores of a split in this unit."""
        return [self.unit.factor * value for value in self.scores(split)]

    def text(self, split: str) -> str:
        """Their mean and standard deviation in this unit."""
        return text(self.scores(split), self.unit.factor, self.unit.decimals)

    def scores(self, split: str, name: str | None = None) -> list[float]:
        """A number of the evaluation after training, of each run that has it; None: what picked
        the best adapter."""
        found = []
        for run in self.runs:
            value = run.after.get(split, {}).get(name or self.select)
            if value is not None and math.isfinite(value):
                found.append(float(value))
        return found

    def mean(self, split: str, name: str | None = None) -> float:
        """Over the seeds; NaN where there is none."""
        return mean(self.scores(split, name))

    def spread(self, split: str, name: str | None = None) -> float:
        """Standard deviation over the seeds, of a sample; NaN for fewer than two."""
        return spread(self.scores(split, name))

    @property
    def trained(self) -> int:
        """Trained numbers, those of a new head with them."""
        summary = self.runs[0].summary
        assert summary is not None
        return int(summary["adapter_parameters"] + summary["trainable_parameters"])


def mean(values: Sequence[float]) -> float:
    """Of no values NaN."""
    return statistics.fmean(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; NaN for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def text(values: Sequence[float], factor: float = 100.0, decimals: int = 1) -> str:
    """Mean and spread as a table has them, by default in per cent.

    >>> text([0.75, 0.77]), text([0.75]), text([])
    ('76.0 ± 1.4', '75.0', '-')
    """
    if not values:
        return formatting.NONE
    middle, apart = mean(values) * factor, spread(values) * factor
    plus = f" ± {apart:.{decimals}f}" if math.isfinite(apart) else ""
    return f"{middle:.{decimals}f}{plus}"


def settings(runs: Sequence[SavedRun]) -> list[Setting]:
    """The finished runs by their configs, in the order of the first of each."""
    found: dict[tuple[Any, ...], list[SavedRun]] = {}
    for run in runs:
        if run.summary is not None:
            config = flat(run.config)
            config.pop("seed", None)
            found.setdefault(tuple(config.items()), []).append(run)
    return [Setting(dict(key), tuple(saved)) for key, saved in found.items()]


def there(folder: pathlib.Path) -> tuple[SavedRun, ...]:
    """The runs in a folder, also those in folders of it; none where there is none yet.

    Raises:
      LoraError: what a run has left cannot be read.
    """
    if not folder.is_dir():
        return ()
    if is_run(folder):
        return read(folder)
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    return tuple(run for path in inner for run in there(path))


def matrices(setting: Setting) -> tuple[str, ...]:
    """Which matrices of a layer its targets name, in the patterns' order.

    >>> matrices(Setting({"lora.targets": ("bert/layer*/attention/{query,value}/kernel",)}, ()))
    ('query', 'value')
    """
    found: dict[str, None] = {}
    for pattern in setting.config["lora.targets"]:
        segments = pattern.removesuffix("/kernel").split("/")
        found |= dict.fromkeys(segments[-1].strip("{}").split(","))
    return tuple(found)
