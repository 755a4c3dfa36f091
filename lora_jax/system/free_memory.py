"""Measure the memory of the host that this process can still allocate."""

from __future__ import annotations

import os
import pathlib


def free_memory(root: pathlib.Path = pathlib.Path("/")) -> float:
    """Return the bytes that this process can still allocate on its machine, in its control group."""
    found = [_of_machine(root / "proc/meminfo")]
    for folder, limit, used, file in _CGROUPS:
        group = root / "sys/fs/cgroup" / folder
        text = (group / limit).read_text().strip() if (group / limit).is_file() else "max"
        if text != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # The kernel frees cached pages of files that are not in use when memory is needed.
            found.append(int(text) - int((group / used).read_text()) + int(stat.get(file, 0)))
    return max(0.0, float(min(found)))


# Version 2, version 1: folder, limit, use, and the part of the use that is only a file cache.
_CGROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _of_machine(meminfo: pathlib.Path) -> int:
    if not meminfo.is_file():  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024
