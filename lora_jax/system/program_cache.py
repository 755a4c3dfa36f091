"""Keep compiled programs on disk, so that the next command need not compile them.

This is JAX's persistent compilation cache, with a size limit, in a folder of the user:

    <cache>/programs/<machine>    <cache>: see `lora_jax.system.user_cache`

The least recently used programs are deleted first. With JAX_COMPILATION_CACHE_DIR, JAX's cache
works as JAX's own variables say, and JAX_ENABLE_COMPILATION_CACHE=false turns it off.

`<machine>` stands for the instruction set of the CPU. JAX's key of a program may not contain it,
and a program for wider vectors would kill the process (SIGILL) on a CPU without them, if machines
of several kinds share a home directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import platform
import warnings
from collections.abc import Callable

import filelock
import jax

from lora_jax.system import user_cache

MOST = 1 << 29  # bytes of programs on disk, for each kind of machine
SHORTEST = 0.1  # seconds of compilation; a faster one is not worth a file

_LOCK = ".lockfile"  # the name that JAX uses


def enable(say: Callable[[str], object]) -> pathlib.Path | None:
    """Let JAX keep compiled programs on disk; return the folder, or None if nothing is kept there.

    Nothing is kept if the folder cannot be written to or locked; the command runs without it. If
    others could have changed it (`lora_jax.system.user_cache`), `say` prints so.
    Nothing is kept for a run of several processes either: these would wait for each other's locks
    on a shared disk, and some would load a program while others compile it. To keep programs there,
    set JAX_COMPILATION_CACHE_DIR.
    """
    if jax.distributed.is_initialized():
        return None
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return None
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return None
    try:
        folder = user_cache.folder("programs", machine())
        _drop_unfinished(folder)
    except user_cache.CacheError as error:
        say(f"note: no compiled programs are kept: {error}")
        return None
    except (OSError, NotImplementedError, filelock.Timeout):
        return None
    jax.config.update("jax_compilation_cache_max_size", MOST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The disk may be full, or a killed process may have left an entry: then JAX just compiles.
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

    JAX writes a program, and then the time of its use. Without this second file it could neither
    use the program nor delete it to make room.
    """
    with filelock.FileLock(folder / _LOCK, timeout=1):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()
        # Check that there is room for a file, and that it may be written.
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
