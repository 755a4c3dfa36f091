"""Run the code of a config file: its faults become errors that name the file and the line."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import traceback
from collections.abc import Iterator

from lora_jax.errors import LoraError, ModelError, nearest, told
from lora_jax.system.extras import MissingExtraError
from lora_jax.training.config import Config, ConfigError
from lora_jax.training.workload import Workload


@contextlib.contextmanager
def blaming(file: str | None) -> Iterator[None]:
    """Turn an error of a config file, which the block runs, into one that names the line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        line, names = getattr(error, "lineno", None), dict[str, object]()
        for frame, number in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename == file:
                line, names = number, frame.f_globals
        said = f"{type(error).__name__}: {error}"
        unknown = re.match(r"(\w+)\.__init__\(\) got an unexpected .*? '(\w+)'", str(error))
        if unknown and dataclasses.is_dataclass(kind := names.get(unknown[1])):
            fields = nearest(unknown[2], [field.name for field in dataclasses.fields(kind)])
            said = f"{unknown[1]} has no field {unknown[2]!r}; nearest: {', '.join(fields)}"
        elif isinstance(error, LoraError | ModelError | MissingExtraError | OSError):
            said = told(error)
        elif isinstance(error, ImportError):
            said += ". Is the name right, and its package installed (`pip install ...`)?"
        raise ConfigError(f"{file}{'' if line is None else f', line {line}'}: {said}") from error


def workload_of(config: Config) -> Workload:
    """Return the workload of a config, which the function of its file makes."""
    make = config.workload
    if make.__module__.startswith("lora_jax."):
        return make(config)
    file = getattr(sys.modules.get(make.__module__), "__file__", None)
    with blaming(file):
        made = make(config)
    if not isinstance(made, Workload):
        raise ConfigError(f"{file}: the function workload must return a Workload, not {made!r}")
    return made
