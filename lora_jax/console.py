"""What a command shows a person: messages, the errors that a user can put right, progress bars."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

from lora_jax.extras import MissingExtraError, require

require("train", __name__)

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

from lora_jax import allocator, program_cache
from lora_jax.errors import LoraError
from lora_jax.models.errors import ModelError

T = TypeVar("T")

# What a user can put right; anything else is a fault of the program and shows its traceback.
USER_ERRORS = (LoraError, ModelError, MissingExtraError, OSError)
_LESS = "Lower --batch-size, where the command has one, or use a machine with more memory."


def say(console: Console, text: str) -> None:
    """Print plain text: no markup in it is read, no number is coloured, no line is wrapped.

    What is said names files, tensors and classes of strangers, so it is made `printable`.
    """
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    r"""Text without the control characters by which it could command a terminal, nor half ones.

    >>> printable("a\tb\n\x1b[2Jc\ud800")
    'a\tb\n\ufffd[2Jc\ufffd'
    """

    def shown(c: str) -> bool:
        return c.isprintable() or c in "\n\t" or (ord(c) > 159 and not "\ud800" <= c <= "\udfff")

    return "".join(c if shown(c) else "\ufffd" for c in text)


def out_of_memory(error: BaseException, cure: str) -> str | None:
    """Return what to tell a person of an error, if it is a lack of memory, on the host or a device.

    Args:
      error: whatever was raised; XLA's own type says what it is in its text alone.
      cure: what takes less memory.
    """
    lacking = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    if not (lacking or isinstance(error, MemoryError)):
        return None
    said = (str(error) or "MemoryError").splitlines()[0][:300]
    return f"there is not enough memory: {said}\n{cure}"


@contextlib.contextmanager
def quiet_storage() -> Iterator[None]:
    """Keep Orbax's pages of tracebacks off the screen while a command runs.

    Of many operations under way Orbax raises the first that fails, and abandons the others. Each
    of those leaves a traceback on stderr when it is collected, and they would bury the one error
    that counts. These settings belong to the whole process, so they are a command's to make, not
    the library's.
    """
    hook, loggers = sys.unraisablehook, [logging.getLogger(name) for name in ("asyncio", "absl")]
    levels = [logger.level for logger in loggers]

    def shown(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            hook(what)

    sys.unraisablehook = shown
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        gc.collect()  # what was abandoned is collected while nobody listens
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def read_options(
    kind: type[T],
    program: str,
    description: str | None,
    arguments: Sequence[str] | None,
    *,
    adding: bool = False,
) -> T:
    """Return the options of a command as the dataclass `kind`, whose docstrings are its `--help`.

    An option that is given more than once is noted on stderr: all but the last are lost. It is not
    an error, since scripts append to a command what is to be another way.

    Args:
      kind: its fields are the options.
      program: the name that `--help` calls the command by.
      description: what `--help` says first.
      arguments: the command line; None: that of this process.
      adding: the values of a repeated option that is a tuple add up.

    Raises:
      SystemExit: `--help`, or an option that is unknown or has a wrong value (said first).
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    found = tyro.cli(
        kind,
        prog=program,
        description=description,
        args=given,
        config=(tyro.conf.FlagCreatePairsOff, *([tyro.conf.UseAppendAction] if adding else [])),
    )
    several = {f"--{f.name}" for f in dataclasses.fields(kind) if isinstance(f.default, tuple)}  # type: ignore[arg-type]
    names = [a.partition("=")[0].replace("_", "-") for a in given if a.startswith("--")]
    for name in dict.fromkeys(names):
        if names.count(name) > 1 and not (adding and name in several):
            times = f"{name} is given {names.count(name)} times"
            say(Console(stderr=True), f"note: {times}; the last one counts")
    return found


def guarded(run: Callable[[], None]) -> int:
    """Run a command and return its exit status.

    0: done, also where the reader of stdout wants no more. 1: an error that is printed on stderr.
    130: Ctrl-C.
    """
    try:
        allocator.keep()
        program_cache.enable()
        with quiet_storage():
            run()
        sys.stdout.flush()
    except BrokenPipeError:
        # What Python flushes as it ends would be an error once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        say(Console(stderr=True, style="red"), f"error: {error}")
        return 1
    except Exception as error:
        if (lack := out_of_memory(error, _LESS)) is None:
            raise
        say(Console(stderr=True, style="red"), f"error: {lack}")
        return 1
    except KeyboardInterrupt:
        say(Console(stderr=True), "Stopped. What was written before is whole.")
        return 130
    return 0


class Bar:
    """A progress bar on a terminal, and nothing elsewhere; a context manager."""

    def __init__(
        self,
        console: Console,
        *columns: ProgressColumn,
        shown: bool = True,
        transient: bool = False,
    ) -> None:
        self.console = console
        visible = shown and console.is_terminal
        self.bar = Progress(*columns, console=console, transient=transient, disable=not visible)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        """Print plain text, above the bar."""
        say(self.console, text)


class _Rate(ProgressColumn):
    """How many of a unit are done in a second."""

    def render(self, task: Task) -> Text:
        """`1,234 texts  56/s`, of what the bar has counted."""
        count, seconds = task.fields["count"], max(task.elapsed or 0.0, 1e-9)
        return Text(f"{count:,} {task.fields['unit']}  {count / seconds:,.0f}/s")


class FileBar(Bar):
    """A bar for the lines of a file, as long as the file where its size is known."""

    def __init__(self, console: Console, file: str | None, unit: str) -> None:
        """Show a bar for `file`, each line of which is one `unit`; None shows none."""
        columns: list[Any] = [BarColumn(), _Rate(), TimeRemainingColumn()]
        super().__init__(console, *columns, shown=file is not None, transient=True)
        path = None if file is None else pathlib.Path(file)
        total = path.stat().st_size if path is not None and path.is_file() else None
        self._task = self.bar.add_task("", total=total, unit=unit, count=0)
        self._count = 0

    def advance(self, size: int) -> None:
        """Note that one more line, of `size` bytes, is done."""
        self._count += 1
        self.bar.update(self._task, advance=size, count=self._count)
