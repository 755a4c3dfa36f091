"""Run the code of a config file: its faults become errors that name the file and the line."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from lora_jax.errors import LoraError, nearest, told
from lora_jax.extras import MissingExtraError
from lora_jax.models.errors import ModelError
from lora_jax.settings import Settings
from lora_jax.training.config import Config, ConfigError
from lora_jax.training.workload import Workload


@contextlib.contextmanager
def blaming(file: str | None) -> Iterator[None]:
    """Turn an error of a config file, which the block runs, into one that names the line.

    Args:
      file: the config file.

    Raises:
      ConfigError: any error of the block.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        lines += [error.lineno] if isinstance(error, SyntaxError) and error.filename == file else []
        place = f"{file}, line {lines[-1]}" if lines else f"{file}"
        raise ConfigError(f"{place}: {_fault(error)}") from error


def _fault(error: BaseException) -> str:
    """Return what is wrong in a config file, with what is near."""
    known = {kind.__name__: kind for kind in _subclasses(Settings)}
    unknown = re.match(r"(?:.*\.)?(\w+)\.__init__\(\) got an unexpected .* '(\w+)'", str(error))
    if isinstance(error, TypeError) and unknown and unknown[1] in known:
        fields = [field.name for field in dataclasses.fields(known[unknown[1]])]
        near = ", ".join(nearest(unknown[2], fields))
        return f"{unknown[1]} has no field {unknown[2]!r}; nearest: {near}"
    if isinstance(error, ImportError) and not isinstance(error, MissingExtraError):
        package = (error.name or "it").partition(".")[0]
        return f"{error}. Is the name right, and is it installed (`pip install {package}`)?"
    ours = isinstance(error, LoraError | ModelError | MissingExtraError | OSError)
    return told(error) if ours else f"{type(error).__name__}: {error}"


def _subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


def workload_of(config: Config) -> Workload:
    """Return the workload of a config, which the function of its file makes.

    Args:
      config: the config of a run.

    Raises:
      ConfigError: the function fails, or does not return a `Workload`.
    """
    make = config.workload
    if make.__module__.startswith("lora_jax."):
        return make(config)
    file = getattr(sys.modules.get(make.__module__), "__file__", None)
    with blaming(file):
        made = make(config)
    if not isinstance(made, Workload):
        raise ConfigError(
            f"{file}: workload must be a function that returns a "
            f"lora_jax.training.workload.Workload; it returned {made!r}"
        )
    return made
