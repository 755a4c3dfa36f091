"""Fill the disk of each command that writes at random points, and then make room.

The command writes to a file system of its own (tmpfs, so this needs the right to mount) that has
room for a random part of what the command writes. It must end with our error, which names a file
and the cure, and leave nothing incomplete under a final name. Then there is room, and the same
command must end with the same bytes as one whose disk was never full.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
import shutil
import subprocess
import time

from tests.faults.commands import SCENARIOS
from tests.faults.scenarios import Scenario

PAGE = 4096  # bytes; tmpfs counts whole pages
ROOM = 2**26
COMMANDS = tuple(name for name in SCENARIOS if name.startswith(("export", "import")))
COMMANDS += ("report", "from", "sweep", "quantised base")


@dataclasses.dataclass
class Filled:
    """The results of one scenario.

    points: the bytes of the full disks, each of which was too small.
    enough: how often a random size was enough, so that it was no point.
    needed: the bytes on the disk after a whole command.
    failures: the faults that were found, in words.
    """

    name: str
    points: list[int] = dataclasses.field(default_factory=list)
    enough: int = 0
    needed: int = 0
    seconds: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        failed = "".join(f"\n  {failure}" for failure in self.failures)
        return (
            f"{len(self.points)} full disks of {self.needed} bytes, {len(self.failures)} failed, "
            f"{self.seconds} s{failed}"
        )


class Disk:
    """A file system of its own."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        folder.mkdir()

    def mount(self, size: int) -> None:
        self.unmount()
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(self.folder)]
        subprocess.run(["mount", *options], check=True)

    def resize(self, size: int) -> None:
        """Give it another size, and keep its files."""
        options = ["-o", f"remount,size={size}", str(self.folder)]
        subprocess.run(["mount", *options], check=True)

    def unmount(self) -> None:
        if self.folder.is_mount():
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


def fill(name: str, folder: pathlib.Path, points: int, seed: int) -> Filled:
    """Run one scenario on `points` disks that are too small, and then on larger ones."""
    began, found = time.monotonic(), Filled(name)
    scenario, draw = SCENARIOS[name](folder), random.Random(f"{seed} {name}")
    _run(scenario, scenario.whole, 0)
    disk = Disk(folder / "disk")
    disk.mount(ROOM)
    place = disk.folder / "out"
    try:
        scenario.before(place)
        least = ROOM - shutil.disk_usage(disk.folder).free
        _run(scenario, place, 0)
        found.needed = ROOM - shutil.disk_usage(disk.folder).free
        while len(found.points) < points and found.enough < 3 * points:
            size = least + draw.randint(1, found.needed // PAGE) * PAGE
            disk.mount(size)
            try:
                scenario.before(place)
                if _run(scenario, place, None) == 0:
                    scenario.assert_same(place)
                    found.enough += 1
                    continue
                found.points.append(size)
                _point(scenario, disk, place)
            except Exception as error:  # noqa: BLE001 - any failure is a result
                kept = folder / f"failed-{len(found.failures)}"
                shutil.copytree(disk.folder, kept)
                said = (folder / "out.log").read_text()[-1500:]
                found.failures.append(f"{size} bytes: {error}\n{kept}\n{said}")
    finally:
        disk.unmount()
    found.seconds = round(time.monotonic() - began, 1)
    return found


def _point(scenario: Scenario, disk: Disk, place: pathlib.Path) -> None:
    """Check the error and the files that a full disk left, make room, and run it again."""
    said = " ".join((scenario.folder / "out.log").read_text().split())
    assert "error: " in said and "Traceback" not in said, "it is not our error"
    assert "No space left on device" in said and "ake room" in said, "the cause or the cure lacks"
    scenario.state(place)
    disk.resize(ROOM)
    if not scenario.is_finished(place):
        _run(scenario, place, 0)
    scenario.assert_same(place)


def _run(scenario: Scenario, place: pathlib.Path, wanted: int | None) -> int:
    """Run the command with a new log, and return its exit status, which may have to be `wanted`."""
    (scenario.folder / f"{place.name}.log").unlink(missing_ok=True)
    (fork,) = scenario.start(place)
    status = fork.wait()
    assert wanted in (None, status), f"exit status {status}: {fork.log.read_text()[-2000:]}"
    return status
