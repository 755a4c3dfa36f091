"""The compiled programs that commands keep on disk, so that the next command need not compile.

This is JAX's persistent compilation cache, in a folder of the user, with a bound on its size:

    <cache>/programs/<machine>    <cache>: LORA_JAX_CACHE, or lora_jax in XDG_CACHE_HOME or ~/.cache

The least recently used programs are deleted first. With JAX_COMPILATION_CACHE_DIR set, JAX's cache
works as JAX's own variables describe it; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
 `<machine>` stands for the CPU's instruction set. JAX's key of a program is not known to contain
it. If machines of several kinds share a home, a program for wider vectors would end the process
(SIGILL) on a CPU without them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import warnings

import filelock
import jax

from lora_jax.models.weights import packages

MOST = 1 << 29  # bytes of programs on disk, for each kind of machine
SHORTEST = 0.1  # seconds of compilation; a program that takes less is not worth a file

_LOCK = ".lockfile"  # the name of JAX's own lock


def enable() -> pathlib.Path | None:
    """Make JAX keep compiled programs, and return the folder.

    It returns None, and JAX keeps nothing or follows its own settings, if the folder cannot be
    written or locked, or if the run has several processes. Those would wait for each other's locks
    on a shared disk, and some would load a program that others compile. Give them a folder with
    JAX's variable.
    """
    if jax.distributed.is_initialized():
        return None
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return None
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    folder = packages.cache() / "programs" / machine()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _drop_unfinished(folder)
    except (OSError, NotImplementedError, filelock.Timeout):
        return None
    jax.config.update("jax_compilation_cache_max_size", MOST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # After a full disk, or with an entry from a killed process, JAX simply compiles again.
    warnings.filterwarnings(
        "ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning
    )
    return folder


def machine(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
    """Return a name for the CPU's instruction set: `x86_64-` and a hash of its features."""
    facts = {platform.machine(), platform.processor()}
    with contextlib.suppress(OSError):  # not Linux
        lines = cpuinfo.read_text().splitlines()
        kinds = ("flags", "Features", "isa", "model name", "CPU part")
        facts |= {line for line in lines if line.startswith(kinds)}
    digest = hashlib.sha256("\n".join(sorted(facts)).encode()).hexdigest()
    return f"{platform.machine()}-{digest[:12]}"


def _drop_unfinished(folder: pathlib.Path) -> None:
    """Delete programs that a process was writing when it was killed.

    JAX writes a program and then the time of its use. Without the second file it could neither use
    the program nor delete others to make room.
    """
    with filelock.FileLock(folder / _LOCK, timeout=1):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()
        # Fail now if the disk is full or the folder is read-only.
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
