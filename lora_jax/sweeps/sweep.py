"""Sweeps: a config, and the values to try for some of its fields."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import tyro

from lora_jax.sweeps import config_fields, member_names
from lora_jax.sweeps.config import GroupConfig, GroupOptions, Member
from lora_jax.system.checked import type_name
from lora_jax.training.config import Config, ConfigError, check_lora_counts, require

Grid = Mapping[str, Sequence[Any] | str]
Converter = Callable[[Any, Any], Any]  # (value or text, type) -> value
Point = dict[str, Any]  # path -> value
# These fields are set for a group as a whole, and not for its members.
_OF_GROUP = ("run_dir", "fresh", "mesh", "processes")


def _from_line(words: list[str]) -> Grid:
    grid = {}
    for word in words:
        path, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not PATH=VALUE,VALUE,...")
        grid[path] = text
    return grid


def _to_line(grid: Grid) -> list[str]:
    return [f"{path}={v if isinstance(v, str) else _joined(v)}" for path, v in grid.items()]


def _joined(values: Sequence[Any]) -> str:
    several = any(isinstance(value, list | tuple) for value in values)
    texts = (" ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in values)
    return (";" if several else ",").join(texts)


_ON_THE_LINE = tyro.constructors.PrimitiveConstructorSpec[Any](
    nargs="*",
    metavar="[PATH=VALUE,VALUE,...]",
    instance_from_str=_from_line,
    is_instance=lambda grid: isinstance(grid, Mapping),
    str_from_instance=_to_line,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig(GroupOptions):
    """A config that is trained once for each combination of values of some of its fields.

    A member is the same run as `train.py --config <base> --lora.rank 4 ...` with its values.
    """

    base: Config
    """The config that all members share."""
    grid: Annotated[Grid, _ON_THE_LINE] = dataclasses.field(default_factory=dict)
    """Field -> values; all combinations are trained: lora.rank=1,2,4
    optimizer.learning_rate=1e-3,3e-3. If a value contains commas, separate values with semicolons,
    and the patterns of one value of lora.targets with spaces:
    "lora.targets=**/query/kernel;**/query/kernel **/value/kernel"."""
    cases: tyro.conf.Suppress[tuple[Mapping[str, Any], ...]] = ()
    """A list of cases, each field -> value. With a grid, every case is trained with all of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        default = Config(workload=self.base.workload)
        for name in _OF_GROUP:
            if getattr(self.base, name) != getattr(default, name):
                option = name.replace("_", "-")
                raise ConfigError(f"base.{name} is set for the sweep as a whole: give --{option}")
        self.expand()

    def points(self) -> list[Point]:
        """Return the values of each member.

        Raises:
          ConfigError: a field does not exist, a value has another type, or a member comes twice.
        """
        grid = {path: self._listed(path, found) for path, found in self.grid.items()}
        cases = [{p: self._made(p, v, "cases") for p, v in case.items()} for case in self.cases]
        both = [path for case in cases for path in case if path in grid]
        require(not both, "grid", both, "of other fields than cases")
        combined = itertools.product(*grid.values())
        tried = [dict(zip(grid, point, strict=True)) for point in combined]
        found = [{**case, **point} for case in cases or [{}] for point in tried]
        twice = [text for text, times in Counter(map(str, found)).items() if times > 1]
        require(not twice, "grid and cases", twice, "members that differ")
        return found

    def expand(self) -> GroupConfig:
        """Return the group of all members, which are named by their values."""
        points = self.points()
        members = tuple(
            Member(name, self._with(point))
            for name, point in zip(member_names.names(points), points, strict=True)
        )
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(GroupOptions)}
        return GroupConfig(members=members, **options)

    def _with(self, point: Point) -> Config:
        config = self.base
        for path, value in point.items():
            config = config_fields.with_field(config, path, value)
        for path in point:
            if path.startswith("lora."):
                check_lora_counts(config, path)
        return config

    def _listed(self, path: str, found: Sequence[Any] | str) -> list[Any]:
        make: Converter = config_fields.converted
        if isinstance(found, str):
            hint = config_fields.field_type(self.base, path, "grid")
            apart = ";" if ";" in found or config_fields.may_be_tuple(hint) else ","
            make, found = config_fields.read, [text.strip() for text in found.split(apart)]
        require(len(found) > 0, f"grid: {path}", found, "at least one value")
        return [self._made(path, value, "grid", make) for value in found]

    def _made(
        self, path: str, value: Any, where: str, make: Converter = config_fields.converted
    ) -> Any:
        hint = config_fields.field_type(self.base, path, where)
        try:
            return make(value, hint)
        except ValueError:
            raise ConfigError(f"{where}: {path} must be {type_name(hint)}, got {value!r}") from None
