"""The command line: `--config file.py[:name]`, then any field of the config in it.

Of a group they are the group's own fields and those of each member: `--<member>.lora.rank 4`.

tyro reads the fields off the dataclasses: it refuses unknown ones with the nearest names, checks
types and writes `--help` from the docstrings.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import pathlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Annotated, Any

from lora_jax.extras import require

require("train", __name__)

import tyro

from lora_jax import planner
from lora_jax.console import read_options
from lora_jax.errors import listed, nearest
from lora_jax.groups.config import GroupConfig, GroupOptions
from lora_jax.groups.sweep import SweepConfig
from lora_jax.training.config import Config, ConfigError, check_lora_counts, check_start

Runnable = Config | GroupOptions


def parse(
    arguments: Sequence[str], default: str, root: pathlib.Path, program: str = "train.py"
) -> tuple[str, Config | GroupConfig, planner.PlanOptions]:
    """The config's name, its value with the command line's changes, and what is to be planned.

    A sweep is given as the group of its members.

    Args:
      arguments: what follows `train.py` on the command line.
      default: the config file without `--config`.
      root: where a config path is looked for that is not found from the working directory.
      program: what `--help` calls the program.

    Raises:
      ConfigError: no such config file, or none in it, or a group's members cannot be as is said.
      SystemExit: `--help`, or a field that is unknown or has a wrong type or value (said first).
    """
    reference = _reference(arguments, default)
    name, config = load(reference, root)
    members = config.members if isinstance(config, GroupConfig) else ()
    asked = bool({"--help", "-h"} & set(arguments))
    shown = members[:1] if asked else members
    fields = [
        ("config", Annotated[str, tyro.conf.arg(help=_HELP)], reference),
        _field("run", "", config),
        _field("plan", "", planner.PlanOptions()),
        *(_field(f"member{i}", member.name, member.config) for i, member in enumerate(shown)),
    ]
    about = f"{_about(reference, [member.name for member in members])} {_VARIABLES}"
    kind: Any = dataclasses.make_dataclass("CommandLine", fields)
    given = read_options(kind, program, about, arguments)
    run = given.run
    if members:
        changed = [
            dataclasses.replace(member, config=getattr(given, f"member{i}"))
            for i, member in enumerate(members)
        ]
        run = dataclasses.replace(run, members=tuple(changed))
    for before, after in _pairs(config, run):
        if before.lora != after.lora:
            check_lora_counts(after, "the command line")
            check_start(before, after)
    if not isinstance(run, GroupOptions):
        return name, run, given.plan
    if given.plan.plan:
        raise ConfigError("--plan is of one run: give it with the config of one member")
    return name, run.expand(), given.plan


def _pairs(before: Runnable, after: Runnable) -> list[tuple[Config, Config]]:
    """Each run in the file, and what the command line has made of it."""
    match before, after:
        case Config(), Config():
            return [(before, after)]
        case SweepConfig(), SweepConfig():
            return [(before.base, after.base)]
        case GroupConfig(), GroupConfig():
            both = zip(before.members, after.members, strict=True)
            return [(one.config, two.config) for one, two in both]
    raise TypeError(f"{type(before)} and {type(after)}")


def _field(name: str, prefix: str, value: Any) -> tuple[str, Any, Any]:
    """A field of the command line whose own fields begin with `--<prefix>.`."""
    kind: Any = type(value)
    return (
        name,
        Annotated[kind, tyro.conf.arg(name=prefix)],
        dataclasses.field(default=value),
    )


def _about(reference: str, members: Sequence[str]) -> str:
    if not members:
        return f"Train by {reference}. Every field of the config can be set here."
    return (
        f"Train by {reference}: {', '.join(members)}, together. Every field of each can be set "
        f"here; those of {members[0]} are shown, and the others have theirs in the same way."
    )


_VARIABLES = "`lora-jax --help` says which environment variables every command reads."
_HELP = "The config file; `file.py:name` picks another value in it than `config`."


def _reference(arguments: Sequence[str], default: str) -> str:
    """The value of `--config`, before the fields that it brings are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=default)
    return parser.parse_known_args(list(arguments))[0].config


def load(reference: str, root: pathlib.Path) -> tuple[str, Runnable]:
    """The config that `path.py` or `path.py:name` stands for, and its name in the run directory."""
    text, _, attribute = reference.partition(":")
    module = _run(_find(pathlib.Path(text), root))
    config = getattr(module, attribute or "config", None)
    if not isinstance(config, Runnable):
        there = [name for name, value in vars(module).items() if isinstance(value, Runnable)]
        raise ConfigError(
            f"{text} has no config named {attribute or 'config'!r}: a config file holds "
            "`config = Config(...)` (lora_jax.training.config), "
            + (f"and this one holds\n{listed(there, 20)}" if there else "and this one holds none")
        )
    stem = pathlib.Path(text).stem
    return (f"{stem}-{attribute}" if attribute else stem), config


def _find(path: pathlib.Path, root: pathlib.Path) -> pathlib.Path:
    for candidate in (path, root / path):
        if candidate.is_file():
            return candidate
    folder = next((p for p in (path.parent, root / path.parent) if p.is_dir()), root)
    files = {p.resolve(): p for p in (*(root / "configs").glob("*.py"), *folder.glob("*.py"))}
    there = sorted(str(p) for p in files.values() if p.name not in ("__init__.py", "train.py"))
    raise ConfigError(
        f"no config file {path}; nearest:\n{listed(nearest(str(path), there, n=1))}\n"
        f"there are:\n{listed(there, limit=20)}"
    )


def _run(path: pathlib.Path) -> ModuleType:
    """The file as a module. It is registered, so that dataclasses in it can be resolved."""
    name = f"config_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
