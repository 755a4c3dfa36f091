"""The memory of the host: what is free, and what this process keeps for its next step.

On a CPU every step of a training run needs the same large buffers. glibc takes each of them from
the kernel by `mmap` and returns it when XLA frees it, so in the next step all of its pages must be
mapped and cleared again: 95,000 page faults in a training step of MiniLM, 18 % of its CPU time.
`keep` makes glibc serve all threads from one heap, which it never shrinks.

The price is resident memory: a freed buffer with a small new one in it cannot be reused as a whole,
so the process may hold three of the largest buffers instead of one (MiniLM 32 x 48: 1.7 GB instead
of 1.0, SmolLM2 8 x 48: 3.0 GB instead of 1.8). A thread watches a bound: a process that exceeds it
returns to glibc's defaults for good.

These settings affect the whole process, so only the commands make them, never the library.
"""

from __future__ import annotations

import ctypes
import glob
import logging
import os
import pathlib
import platform
import sys
import threading
import time

import jax

from lora_jax.errors import LoraError

VARIABLE = "LORA_JAX_KEEP_MEMORY"
SHARE = 0.5  # the default share of the free memory

# Parameters of mallopt (malloc.h), and their values.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
# With several arenas, the threads of the others would still take large buffers by mmap.
_KEEP = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
# glibc reaches these values by itself after large buffers have been freed.
_GIVE_BACK = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20))

_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/dxg")
_GLIBC = ("ARENA_MAX", "MMAP_MAX_", "MMAP_THRESHOLD_", "TRIM_THRESHOLD_", "TOP_PAD_")
# Version 2, version 1: folder, limit, use, and the part of the use that is only a file cache.
_CGROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_SECONDS = 0.5  # between two readings of the resident memory
_WATCH = "lora_jax host memory"


def keep() -> bool:
    """Let this process keep the memory that it frees, up to a bound; return whether it does.

    Call this before JAX starts a backend, which allocates from threads of its own. It does nothing
    with a C library other than glibc, if JAX runs on an accelerator, or if GLIBC_TUNABLES or a
    MALLOC_ variable sets the allocator.

    LORA_JAX_KEEP_MEMORY is the bound: the share of the free memory (of the machine and of the
    process's control group) that the process may hold. The default is 0.5; 0 keeps nothing.
    """
    share = _share()
    if share == 0 or not (_is_glibc() and _is_cpu()) or _is_set_by_user():
        return False
    if any(thread.name == _WATCH for thread in threading.enumerate()):
        return True
    bound = resident() + share * free()
    _set(_KEEP)
    threading.Thread(target=_watch, args=(bound,), name=_WATCH, daemon=True).start()
    return True


def resident() -> int:
    """Return the bytes of this process that are in memory (Linux)."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def free(root: pathlib.Path = pathlib.Path("/")) -> float:
    """Return the bytes that this process can still allocate in its machine and control group."""
    found = [_of_machine(root / "proc/meminfo")]
    for folder, limit, used, file in _CGROUPS:
        group = root / "sys/fs/cgroup" / folder
        text = (group / limit).read_text().strip() if (group / limit).is_file() else "max"
        if text != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # The kernel frees cached pages of files that are not in use when memory is needed.
            found.append(int(text) - int((group / used).read_text()) + int(stat.get(file, 0)))
    return max(0.0, float(min(found)))


def _share() -> float:
    text = os.environ.get(VARIABLE, "")
    try:
        share = float(text or SHARE)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise LoraError(
            f"{VARIABLE} must be a number from 0 to 1, got {text!r}: the share of the free memory "
            f"that the process may hold, {SHARE} by default; 0 returns all freed memory"
        )
    return share


def _is_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def _is_cpu() -> bool:
    """Return whether JAX will run on the CPU, without starting its backend."""
    named = jax.config.jax_platforms  # type: ignore[attr-defined]
    if named:
        return str(named).split(",")[0] == "cpu"
    return not any(glob.glob(pattern) for pattern in _ACCELERATORS)


def _is_set_by_user() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc" in tunables or any(f"MALLOC_{name}" in os.environ for name in _GLIBC)


def _set(values: tuple[tuple[int, int], ...]) -> None:
    libc = ctypes.CDLL(None)
    for parameter, value in values:
        libc.mallopt(parameter, value)


def _watch(bound: float) -> None:
    while (size := resident()) <= bound:
        time.sleep(_SECONDS)
    _set(_GIVE_BACK)
    ctypes.CDLL(None).malloc_trim(0)
    logging.getLogger(__name__).warning(
        "%.1f GB in memory, more than the %.1f GB up to which freed memory is kept (%s): from now "
        "on it is returned, and steps take longer",
        size / 1e9,
        bound / 1e9,
        VARIABLE,
    )


def _of_machine(meminfo: pathlib.Path) -> int:
    if not meminfo.is_file():  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
