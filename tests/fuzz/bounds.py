"""The limits of a case: time, memory, places that it may write to, and its messages.

A case that breaks one of these raises `BrokenError`. Time is processor time, because the machine
may be busy. Memory is the peak that the process really held. Writes are seen by an audit hook of
Python, and by looking at the folders afterwards.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any, ClassVar

from lora_jax.system.console import printable

SECONDS = 2.0
BYTES = 10**9
ADDRESSES = 4 * 10**9  # of address space, above the present size: a larger request fails at once
LONGEST = 10_000  # characters in a message

_FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill")
_FORBIDDEN += ("subprocess.Popen", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen")
_CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod")
_CHANGING += ("os.truncate", "os.utime", "os.chown", "os.mkfifo", "shutil.rmtree")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_MATCHER = "/lora_jax/exchange/patterns.py"  # runs with limits of its own
_ALLOWED = ("/dev/null", "__pycache__")  # and the folder of compiled programs


class BrokenError(AssertionError):
    """A case broke a rule of this module."""


class TooSlowError(BaseException):
    """Raised in the middle of a case, so that no `except Exception` catches it."""


class _Watch:
    """An audit hook that notes forbidden events while it is on."""

    on, installed, secret = False, False, ""
    noted: ClassVar[list[str]] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        outside = not any(part in str(args) for part in (*_ALLOWED, *([kept] if kept else [])))
        if event == "open" and not isinstance(args[0], int):
            name = os.fsdecode(args[0])
            if args[2] & _WRITING and outside:
                self.noted.append(f"opens {name} to write")
            if name.endswith(self.secret) and os.path.abspath(name).endswith(self.secret):
                self.noted.append(f"reads {name}")
        matches = event == "subprocess.Popen" and _MATCHER in str(args)
        if (event in _CHANGING and outside) or (event in _FORBIDDEN and not matches):
            self.noted.append(f"{event}{args}")


_watch = _Watch()


@contextlib.contextmanager
def bounded(secret: pathlib.Path, most: int = BYTES) -> Iterator[None]:
    """Run a case; `BrokenError` if it takes more than `SECONDS` of processor time or `most` bytes.

    It may also not open the file `secret`, change a file or start a program.
    """
    if not _watch.installed:
        sys.addaudithook(_watch)
        _watch.installed = True
    _watch.noted.clear()
    _watch.secret, before = f"/{secret.name}", _reset_peak()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_addresses() + ADDRESSES, limits[1]))
    old = signal.signal(signal.SIGPROF, _stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    start, _watch.on = time.process_time(), True
    try:
        yield
    except TooSlowError:
        raise BrokenError(f"took more than {SECONDS} seconds") from None
    finally:
        _watch.on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        seconds, size = time.process_time() - start, _peak() - before
        if seconds > SECONDS:
            raise BrokenError(f"took {seconds:.1f} seconds, more than {SECONDS}")
        if size > most:
            raise BrokenError(f"took {size:,} bytes, more than {most:,}")
        if _watch.noted:
            raise BrokenError("; ".join(_watch.noted[:5]))


def check_message(error: BaseException) -> None:
    """Raise unless the message of an error can be shown to a person."""
    text = str(error)
    if not text.strip() or len(text) > LONGEST:
        raise BrokenError(f"a message of {len(text)} characters: {text[:200]!r}") from error
    try:
        printable(text).encode()
    except UnicodeEncodeError:
        raise BrokenError(f"a message that no terminal can show: {text[:200]!r}") from error


def _stop(*_: Any) -> None:
    raise TooSlowError


def _reset_peak() -> int:
    """Set the peak of the process's resident memory to its present size, and return that."""
    with contextlib.suppress(OSError):  # not Linux
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    try:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _addresses() -> int:
    try:
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return ADDRESSES
    return pages * resource.getpagesize()
