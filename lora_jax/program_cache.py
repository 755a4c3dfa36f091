"""The compiled programs that commands keep on disk, so that the next one need not compile them.

This is JAX's persistent compilation cache, in a folder of the user's, below a bound:

    <cache>/programs/<machine>    <cache>: LORA_JAX_CACHE, or lora_jax in XDG_CACHE_HOME or ~/.cache

The least recently used programs go first. Whoever sets JAX_COMPILATION_CACHE_DIR has JAX's cache as
JAX's own variables describe it, and JAX_ENABLE_COMPILATION_CACHE=false turns it off.

`<machine>` stands for the CPU's instruction set. JAX's key of a program is not known to hold it,
and a program for wider vectors would end the process (SIGILL) on a CPU without them, where machines
of several kinds share a home.
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
SHORTEST = 0.1  # seconds of compilation; what takes less is not worth a file

_LOCK = ".lockfile"  # JAX's own


def enable() -> pathlib.Path | None:
    """Have JAX keep compiled programs, and return the folder; None: it does not, or in its own way.

    Nothing is kept where the folder cannot be written to or locked: a command runs without it. So
    does a run of several processes, which would wait for each other's locks on a shared disk, and
    of which some would load a program that others compile; give those a folder by JAX's variable.
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
    # A full disk, or an entry that a killed process left: JAX compiles, and nobody need know.
    warnings.filterwarnings(
        "ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning
    )
    return folder


def machine(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
    """Name the CPU's instruction set: `x86_64-` and a hash of what it can do."""
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
    the program nor make room for others.
    """
    with filelock.FileLock(folder / _LOCK, timeout=1):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()
        # Is there room for a file at all, and may it be written?
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
