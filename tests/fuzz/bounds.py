"""What a case may take, where it may write, and how it may end.

A case that breaks one of these raises `BrokenError`. Time is the processor's (the machine may be
busy), memory is what the process really held at its peak, and writes are seen by an audit hook of
Python and by what is in the folders afterwards.
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
from typing import Any

from lora_jax.console import printable

SECONDS = 2.0
BYTES = 10**9
ADDRESSES = 4 * 10**9  # of address space: a request for more fails at once
LONGEST = 10_000  # characters of a message

_FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.kill")
_FORBIDDEN += ("subprocess.Popen", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen")
_CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod")
_CHANGING += ("os.truncate", "os.utime", "os.chown", "os.mkfifo", "shutil.rmtree")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ALLOWED = ("/dev/null", "__pycache__")  # and the folder of compiled programs


class BrokenError(AssertionError):
    """A case that took or wrote more than it may."""


class TooSlowError(BaseException):
    """Raised in the middle of a case; no `except Exception` may catch it."""


class _Watch:
    """What the audit hook notes while it is on."""

    def __init__(self) -> None:
        self.on, self.installed = False, False
        self.secret = ""
        self.noted: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            if isinstance(path, int):
                return
            name = os.fsdecode(path)
            if flags & _WRITING and not any(part in name for part in self._allowed()):
                self.noted.append(f"opens {name} to write")
            if name.endswith(self.secret) and os.path.abspath(name).endswith(self.secret):
                self.noted.append(f"reads {name}")
        elif (
            event in _CHANGING and not any(part in str(args) for part in self._allowed())
        ) or event in _FORBIDDEN:
            self.noted.append(f"{event}{args}")

    def _allowed(self) -> tuple[str, ...]:
        kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        return (*_ALLOWED, kept) if kept else _ALLOWED


_watch = _Watch()


@contextlib.contextmanager
def bounded(secret: pathlib.Path) -> Iterator[None]:
    """Run a case, and raise if it breaks a rule.

    Args:
      secret: a file outside of the case's folder, which it may not open.

    Raises:
      BrokenError: it takes more than `SECONDS` or `BYTES`, or changes or starts anything.
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
        _check(time.process_time() - start, _peak() - before)


def _check(seconds: float, size: int) -> None:
    if seconds > SECONDS:
        raise BrokenError(f"took {seconds:.1f} seconds, more than {SECONDS}")
    if size > BYTES:
        raise BrokenError(f"took {size:,} bytes, more than {BYTES:,}")
    if _watch.noted:
        raise BrokenError("; ".join(_watch.noted[:5]))


def check_message(error: BaseException) -> None:
    """Raise unless a message is one that a person can be shown."""
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
    """Set the process's peak of resident memory to what it holds now, and return that."""
    with contextlib.suppress(OSError):  # no Linux
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
