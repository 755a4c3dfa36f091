"""The run directory: its lock, its config and its summary.

config.json      the config that the run was started with
metrics.jsonl    see `lora_jax.training.metrics`, with events.* for TensorBoard
wandb.id         the id of the run for the logger, so that it goes on there (also mlflow.id)
checkpoints/     see `lora_jax.training.checkpoints`
adapters/        best and last, which `lora_jax.restore` reads
summary.json     written last; a run with this file is finished
curves.png       loss and scores
error.txt        the error that stopped a member of a group, if there was one
profile/         a trace of JAX's profiler, with --profile
report/          the report, if `lora-jax report` was run
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from lora_jax.checkpoint import adapter_path
from lora_jax.errors import listed, writing
from lora_jax.system import run_lock, whole_files
from lora_jax.training import continuation, curves, processes, profiler
from lora_jax.training.config import Config, ConfigError
from lora_jax.training.config_json import identity, short_hash, to_dict
from lora_jax.training.saved_files import read_config, read_summary

Summary = dict[str, Any]  # summary.json, as `lora_jax.training.summary.summarise` returns it


def default(name: str, config: Config) -> pathlib.Path:
    """Return the run directory: the config's, or runs/<config>-<hash of the deciding fields>."""
    return pathlib.Path(config.run_dir or f"runs/{name}-{short_hash(identity(config))}")


@contextlib.contextmanager
def enter(name: str, config: Config) -> Iterator[pathlib.Path]:
    """Lock the run directory until the block ends, and yield its path.

    Process 0 holds the lock for all processes. If an error comes before the run has begun (for
    example, the model is missing), the directory is left free for any config.
    """
    path = default(name, config)
    with contextlib.ExitStack() as stack:
        processes.by_first(lambda: _take(path, config, stack))
        processes.everywhere(lambda: _check_shared(path))
        try:
            yield path
        except BaseException:
            inside = {entry.name for entry in path.iterdir()} if processes.first() else set()
            if inside and inside <= {"lock", "config.json"}:
                (path / "config.json").unlink(missing_ok=True)
            raise


def _take(path: pathlib.Path, config: Config, stack: contextlib.ExitStack) -> None:
    """Lock the directory until `stack` is closed, and write the config into it."""
    start = config.start_from
    if start and pathlib.Path(start).expanduser().resolve().is_relative_to(path.resolve()):
        raise ConfigError(
            f"--from {start} is in {path}, which this run would overwrite: give another --run-dir"
        )
    busy = ConfigError(f"another process is training in {path}; wait for it or give --run-dir")
    stack.enter_context(run_lock.hold(path, busy))
    whole_files.check_links(path, [entry.name for entry in path.iterdir() if _ours(entry)])
    if config.fresh:
        with writing(path):
            _clear(path)
    _claim(path, config)


def _check_shared(path: pathlib.Path) -> None:
    """Raise unless this process sees the file that process 0 has just written."""
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{path.absolute()} lacks the config.json that process 0 wrote: --run-dir must be on a "
            "file system that all processes share"
        )


def _clear(path: pathlib.Path) -> None:
    """Delete the files of a run, but only if the directory has no other files."""
    foreign = [p.name for p in path.iterdir() if not _ours(p)]
    if foreign:
        raise ConfigError(
            f"--fresh would delete files in {path} that no run wrote:\n{listed(sorted(foreign))}"
        )
    # A kill must leave neither a run that seems finished, nor one that any config may continue.
    order = {"summary.json": 0, "config.json": 2, "lock": 3}
    for entry in sorted(path.iterdir(), key=lambda entry: order.get(entry.name, 1)):
        if entry.name != "lock":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _ours(path: pathlib.Path) -> bool:
    names = {"lock", "config.json", "metrics.jsonl", "checkpoints", "adapters", "summary.json"}
    names |= {"curves.png", "error.txt", "report", "wandb.id", "mlflow.id", profiler.FOLDER}
    written = ("events.out.tfevents.", whole_files.TEMPORARY)
    return path.name in names or path.name.startswith(written)


def _claim(path: pathlib.Path, config: Config) -> None:
    """Write config.json, or check that the run in the directory may go on with the config."""
    file, config = path / "config.json", dated(path, config)
    if file.is_file():
        continuation.reopen(path, read_config(path), config)
        return
    if config.start_from is not None:
        adapter_path.find_one(config.start_from)  # raises before a run directory is begun
    whole_files.write_json(file, to_dict(config))


def dated(path: pathlib.Path, config: Config) -> Config:
    """Return the config with the day on which the run in `path` began, unless it names another."""
    if config.day is not None:
        return config
    there = (path / "config.json").is_file()
    day = read_config(path).get("day") if there else None
    return dataclasses.replace(config, day=day or datetime.date.today().isoformat())


def finish(path: pathlib.Path, summary: Summary) -> None:
    """Draw the curves and then write the summary, which marks the run as finished."""
    whole_files.write(path / curves.FILE, curves.draw(path))
    whole_files.write_json(path / "summary.json", summary)


def summary(path: pathlib.Path) -> Summary | None:
    """Return the summary of a finished run, or None."""
    return read_summary(path) if (path / "summary.json").exists() else None
