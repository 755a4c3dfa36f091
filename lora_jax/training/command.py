"""The command line: `--config file.py[:name]`, then any field of the config in it.

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

import tyro

from lora_jax.errors import listed, nearest
from lora_jax.training import plan
from lora_jax.training.config import Config, ConfigError


def parse(
    arguments: Sequence[str], default: str, root: pathlib.Path
) -> tuple[str, Config, plan.Options]:
    """The config's name, its value with the command line's changes, and what is to be planned.

    Args:
      arguments: what follows `train.py` on the command line.
      default: the config file without `--config`.
      root: where a config path is looked for that is not found from the working directory.

    Raises:
      ConfigError: no such config file, or none in it.
      SystemExit: `--help`, or a field that is unknown or has a wrong type or value (said first).
    """
    reference = _reference(arguments, default)
    name, config = load(reference, root)
    line = dataclasses.make_dataclass(
        "CommandLine",
        [
            ("config", Annotated[str, tyro.conf.arg(help=_HELP)], reference),
            (
                "run",
                Annotated[type(config), tyro.conf.arg(name="")],
                dataclasses.field(default=config),
            ),
            (
                "plan",
                Annotated[plan.Options, tyro.conf.arg(name="")],
                dataclasses.field(default=plan.Options()),
            ),
        ],
    )
    given: Any = tyro.cli(
        line,
        prog="train.py",
        description=f"Train by {reference}. Every field of the config can be set here.",
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return name, given.run, given.plan


_HELP = "The config file; `file.py:name` picks another value in it than `config`."


def _reference(arguments: Sequence[str], default: str) -> str:
    """The value of `--config`, before the fields that it brings are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=default)
    return parser.parse_known_args(list(arguments))[0].config


def load(reference: str, root: pathlib.Path) -> tuple[str, Config]:
    """The config that `path.py` or `path.py:name` stands for, and its name in the run directory."""
    text, _, attribute = reference.partition(":")
    module = _run(_find(pathlib.Path(text), root))
    config = getattr(module, attribute or "config", None)
    if not isinstance(config, Config):
        there = [name for name, value in vars(module).items() if isinstance(value, Config)]
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
