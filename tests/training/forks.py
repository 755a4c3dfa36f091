"""Run train.py or another command in a forked process, which need not import anything again.

The process behaves like one that a shell started: it has its own signals, exit status and output.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pathlib
import runpy
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

import lora_jax.__main__
import train
from lora_jax.training import processes
from tests.training.hooks import Before, Changes

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload([__name__])


class Fork:
    """A process that runs `lora-jax <command> <arguments>`; `log` holds what it prints."""

    def __init__(
        self,
        arguments: tuple[str, ...],
        log: pathlib.Path,
        *,
        cache: pathlib.Path,
        devices: int = 1,
        killed_before: str | None = None,
        killed_at: int | None = None,
        command: str = "train",
    ) -> None:
        """Start the process.

        Args:
          arguments: the arguments of the command line.
          log: the file to which stdout and stderr are appended.
          cache: the folder of compiled programs.
          devices: the number of simulated CPU devices.
          killed_before: kill the process when it is about to rename a file to this name.
          killed_at: kill the process when it is about to make this many changes in the folder of
            `log` (`Changes`); with 0 they are only counted, and the count is in `log`.changes.
          command: the command of `lora-jax`.
        """
        self.log = log
        self._before = len(log.read_text()) if log.exists() else 0
        where = (str(log), str(cache), devices)
        hook = None if killed_before is None else Before(killed_before)
        if killed_at is not None:
            hook = Changes(log.parent, killed_at, log.with_suffix(".changes"))
        self._process = _FORKS.Process(target=_main, args=(command, arguments, *where, hook))
        self._process.start()

    @property
    def status(self) -> int | None:
        """None while it runs, and then the exit status, or minus the signal that ended it."""
        return self._process.exitcode

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended since its status was read."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def wait(self, seconds: float = 240) -> int:
        """Return the exit status; the process must end within `seconds`."""
        self._process.join(seconds)
        if self.status is None:
            self._process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.log.read_text()}")
        return self.status

    def printed(self, text: str, seconds: float = 30) -> str:
        """Return the output once it contains `text`; the last lines come a moment after the end."""
        deadline = time.monotonic() + seconds
        while text not in (printed := self.log.read_text()[self._before :]):
            assert time.monotonic() < deadline, f"no {text!r} in {seconds} s:\n{printed}"
            time.sleep(0.01)
        return printed

    def until(self, condition: Callable[[], Any], seconds: float = 240) -> bool:
        """Return whether `condition` became true while it ran."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.status is not None:
                return False
            assert time.monotonic() < deadline, f"waited {seconds} s:\n{self.log.read_text()}"
            time.sleep(0.001)
        return True

    def kill_when(self, condition: Callable[[], Any]) -> None:
        """Send `kill -9` at the moment that `condition` becomes true."""
        assert self.until(condition), f"it ended before:\n{self.log.read_text()}"
        self.send(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL, self.log.read_text()


def _main(
    command: str,
    arguments: tuple[str, ...],
    log: str,
    cache: str,
    devices: int,
    hook: Before | Changes | None,
) -> None:
    _print_into(log)
    # A shell that starts the tests in the background makes them ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if hook is not None:
        sys.addaudithook(hook)

    def run() -> int:
        if command == "train":
            status = train.main(arguments)
        else:
            status = lora_jax.__main__.main([command, *arguments])
        if isinstance(hook, Changes):
            hook.write()
        return status

    processes.end(run)


def python(words: list[str], log: pathlib.Path, seconds: float = 240) -> int:
    """Run `python <words>` in the repository's root, print into `log`, return the exit status."""
    process = _FORKS.Process(target=_python, args=(words, str(log)))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"still running after {seconds} s:\n{log.read_text()}")
    return process.exitcode


def _python(words: list[str], log: str) -> None:
    _print_into(log)
    root = str(pathlib.Path(train.__file__).parent)
    os.chdir(root)
    sys.path.insert(0, root)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def _print_into(log: str) -> None:
    gc.freeze()  # a collection would touch every imported object, and so copy its memory pages
    gc.set_threshold(50_000, 20, 20)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
