"""Show messages, progress bars, and errors that a user can correct."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import logging
import os
import sys
import threading
import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from lora_jax.system.extras import MissingExtraError, require

require("train", __name__)

import rich.console
import tyro
from rich.progress import Progress, ProgressColumn
from rich.segment import Segment
from rich.text import Text

from lora_jax.errors import LoraError, ModelError, told
from lora_jax.system import host_memory, options_help, program_cache, table

T = TypeVar("T")

# Errors that a user can correct; any other error is a bug and shows its traceback.
USER_ERRORS = (LoraError, ModelError, MissingExtraError, OSError)
_STATUS = """Exit status: 0 done, 1 an error that was printed, 2 a command line that cannot be read,
130 stopped by Ctrl-C."""
_HELP = ("-h", "--help", "--help-all")
_LESS = "Lower --batch-size, if the command has it, or use a machine with more memory."


class Console(rich.console.Console):
    """The screen, which gets only `printable` text: it may come from strangers."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            shown = segment.text if segment.control else printable(segment.text)
            yield Segment(shown, segment.style, segment.control)


def say(console: rich.console.Console, text: str) -> None:
    """Print plain text without markup, coloured numbers or wrapped lines."""
    # Before rich, which drops some control characters and does not show them.
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def say_table(
    console: rich.console.Console,
    rows: Sequence[table.Cells],
    texts: Collection[int] = (0,),
    *,
    styles: Mapping[int, str] | None = None,
    indents: Sequence[str] = (),
) -> None:
    """Print a table as wide as the console (see `table.blocks`); `styles` are by row."""
    blocks = table.blocks(rows, texts, console.width, indents)
    for number, block in enumerate(blocks):
        style = (styles or {}).get(number, "")
        console.print(Text(printable("\n".join(block)), style), soft_wrap=True)


def note(text: str) -> None:
    """Print plain text on stderr, as `say` does."""
    say(Console(stderr=True), text)


def printable(text: str) -> str:
    r"""Write out the characters that could command a terminal or change the order of a line.

    These are control characters, marks of direction and others without a shape, and half
    characters. Letters of all scripts stay, and the two joiners that some scripts need.

    >>> printable("a\tb\n\x1b[2Jc\ud800, \u202ed")
    'a\tb\n\\x1b[2Jc\\ud800, \\u202ed'
    """

    def shown(c: str) -> bool:
        hidden = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        return not hidden or c in "\n\t\u200c\u200d"

    return "".join(c if shown(c) else c.encode("unicode_escape").decode() for c in text)


def out_of_memory(error: BaseException, cure: str) -> str | None:
    """Return a message if an error is a lack of memory on the host or on a device, else None.

    XLA's type of error names its cause only in its text.
    """
    lacking = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    if not (lacking or isinstance(error, MemoryError)):
        return None
    said = (str(error) or "MemoryError").splitlines()[0][:300]
    return f"there is not enough memory: {said}\n{cure}"


@contextlib.contextmanager
def quiet_storage() -> Iterator[None]:
    """Keep Orbax's tracebacks off the screen while a command runs.

    If several of Orbax's operations fail, it raises the first error and abandons the others. Each
    of these prints a traceback to stderr when it is collected, which would hide the error that
    counts. These settings affect the whole process, so only commands make them, never the library.
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
        for thread in threading.enumerate():
            if type(thread).__module__.startswith("orbax"):  # it is about to print an error
                threading.Thread.join(thread, 5)  # its own would raise that error
        gc.collect()  # collect abandoned operations while their tracebacks are not printed
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
    brief: Callable[[Sequence[options_help.Option], int], str] | None = None,
) -> T:
    """Return the options of a command as the dataclass `kind`, whose docstrings are its `--help`.

    `brief` makes a shorter help of the options and the width of the screen; `--help-all` is then
    the whole one.

    An option that is given more than once is noted on stderr, because only the last one counts. It
    is not an error, because scripts append options to a command to change it. With `adding`, the
    values of a repeated option that is a tuple add up.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    refuse_empty(given)
    asked = {*_HELP} & {*given}
    own = (tyro.conf.FlagCreatePairsOff, *([tyro.conf.UseAppendAction] if adding else []))

    def read(words: list[str]) -> T:
        return tyro.cli(kind, prog=program, args=words, config=own)

    if asked:
        with contextlib.redirect_stdout(io.StringIO()):  # checks the other options, no more
            try:
                read([*(word for word in given if word not in _HELP), "--help"])
            except SystemExit as end:
                if end.code:
                    raise
        known, width = list(options_help.options(kind)), min(Console().width, 100)
        if brief is not None and "--help-all" not in asked:
            text = brief(known, width)
        else:
            about = options_help.described(description or "", width)
            positional = "".join(f" {x.name}" for x in known if x.name[0] != "-")
            text = f"usage: {program}{positional} [OPTIONS]\n\n{about}\n\n"
            text += options_help.full(known, width)
        sys.stdout.write(f"{text}\n")
        raise SystemExit(0)
    found = read(given)
    several = {f"--{f.name}" for f in dataclasses.fields(kind) if isinstance(f.default, tuple)}  # type: ignore[arg-type]
    names = [a.partition("=")[0].replace("_", "-") for a in given if a.startswith("--")]
    for name in dict.fromkeys(names):
        if names.count(name) > 1 and not (adding and name in several):
            times = f"{name} is given {names.count(name)} times"
            note(f"note: {times}; the last one counts")
    return found


# Options that may be empty. An empty path would be the working directory, or a default.
_TEXTS = ["--text", "--prompt", "--stop", "--labels"]
_TEXTS += ["--data.prompt", "--data.answer", "--data.eos"]


def refuse_empty(given: Sequence[str]) -> None:
    """End the process, with status 2, if an argument is empty as an unset variable leaves it."""
    for before, word in zip(["the first argument", *given], given, strict=False):
        option, equals, value = word.partition("=") if word[:2] == "--" else (before, "=", word)
        if equals and not value.strip() and option.replace("_", "-") not in _TEXTS:
            said = f"error: {option} is empty; is a variable of the shell not set?"
            say(Console(stderr=True, style="red"), said)
            raise SystemExit(2)


def command(
    name: str,
    kind: type[T],
    about: str | None,
    run: Callable[[T, Console, Console], None],
    adding: bool = False,
) -> Callable[[Sequence[str] | None], int]:
    """Return the `main` of a command: it takes its arguments and returns the exit status.

    `run` gets the options, and the consoles of stdout and of stderr.
    """

    def main(arguments: Sequence[str] | None = None) -> int:
        text = f"{(about or '').rstrip()}\n\n{_STATUS}"
        given = read_options(kind, f"lora-jax {name}", text, arguments, adding=adding)
        return guarded(lambda: run(given, Console(), Console(stderr=True)))

    return main


@quiet_storage()  # also while the error is shown, which holds on to the operations that failed
def guarded(run: Callable[[], None]) -> int:
    """Run a command, and return its exit status.

    It is 0 if the command is done, or if the reader of stdout has closed it; 1 after an error,
    which is printed on stderr; 130 after Ctrl-C.
    """
    try:
        host_memory.keep()
        program_cache.enable(note)
        run()
        sys.stdout.flush()
    except BrokenPipeError:
        # Without this, the flush at Python's exit would raise the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        said = told(error) if isinstance(error, USER_ERRORS) else out_of_memory(error, _LESS)
        if said is None:
            raise
        say(Console(stderr=True, style="red"), f"error: {said}")
        return 1
    except KeyboardInterrupt:
        note("Stopped. Everything written before is complete.")
        return 130
    return 0


class Bar(Progress):
    """A context manager that shows a progress bar on a terminal, and nothing elsewhere."""

    def __init__(
        self, console: Console, *columns: ProgressColumn, shown: bool = True, **options: Any
    ) -> None:
        hidden = not (shown and console.is_terminal)
        super().__init__(*columns, console=console, disable=hidden, **options)

    def say(self, text: str) -> None:
        say(self.console, text)
