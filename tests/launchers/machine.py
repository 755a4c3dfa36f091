"""A machine for a launcher, with a network, host names and processes that only it sees.

These are Linux namespaces, which need root (CAP_SYS_ADMIN in a container) and not systemd. Every
process on the machine, daemons included, is killed when the machine ends, even when the tests are
killed.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import pytest

from tests.training.test_resume import checkpoints

ROOT = pathlib.Path(__file__).parents[2]
# pdeathsig and kill-child: the machine ends with this process, and all of its processes with it.
NAMESPACES = (
    "setpriv --pdeathsig KILL unshare --mount --net --pid --uts --fork --kill-child --mount-proc"
)
CARRIERS = (b"sh", b"bash", b"env", b"srun", b"mpirun", b"prterun", b"nsenter", b"unshare")
# Prefixes of the variables of this process that a machine does not inherit.
LAUNCHERS = ("SLURM_", "OMPI_", "PMIX_", "KUBERNETES_", "JOB_COMPLETION_INDEX")
_START = """
set -e
ip link set lo up
for address in {addresses}; do ip address add "$address/32" dev lo; done
mount --bind {folder}/hosts /etc/hosts
hostname {name}
touch {folder}/up
sleep infinity & wait  # a shell, since the first process of a machine has to reap the others
"""


def installed(*commands: str) -> bool:
    """Return whether the commands exist and this user may start a machine here."""
    if not all(map(shutil.which, (*commands, "unshare", "nsenter", "ip"))):
        return False
    line = f"{NAMESPACES} ip link set lo up"
    return subprocess.run(line.split(), capture_output=True, timeout=30).returncode == 0


def skipped_without(installed: object, what: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a launcher's tests."""
    return [pytest.mark.slow, pytest.mark.skipif(not installed, reason=f"no {what} here")]


def reached(run: pathlib.Path, step: int, why: Callable[[], str]) -> None:
    wait_for(lambda: max(checkpoints(run), default=0) >= step, why)


def wait_for(condition: Callable[[], Any], why: Callable[[], str], seconds: float = 240) -> Any:
    """Wait until `condition` is true and return its value; `why` explains a failure."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s:\n{why()}"
        time.sleep(0.2)
    return found


class Machine:
    """A machine that runs commands while its context is entered."""

    def __init__(self, folder: pathlib.Path, hosts: Mapping[str, str]) -> None:
        """Describe the machine: its folder, and addresses by host name; the first is its own."""
        self.folder, self._hosts = folder, dict(hosts)
        ours = {name: x for name, x in os.environ.items() if not name.startswith(LAUNCHERS)}
        self.environment = ours | {
            "MACHINE": str(folder),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }

    def begin(self) -> None:
        """Start the machine's daemons; a plain machine has none."""

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "up").unlink(missing_ok=True)
        lines = [f"{address} {name}" for name, address in self._hosts.items()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        script = _START.format(
            addresses=" ".join(dict.fromkeys(self._hosts.values())),
            folder=shlex.quote(str(self.folder)),
            name=next(iter(self._hosts)),
        )
        self._holder = subprocess.Popen([*NAMESPACES.split(), "sh", "-c", script])
        wait_for(
            lambda: self._holder.poll() is not None or (self.folder / "up").exists(),
            lambda: "the machine does not start",
        )
        pid = self._holder.pid
        self.pid = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().strip()
        try:
            self.begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        os.kill(int(self.pid), signal.SIGKILL)  # this also kills every process on the machine
        self._holder.wait()

    def start(self, words: Sequence[str], log: pathlib.Path) -> subprocess.Popen[bytes]:
        """Start a command on the machine, in the repository's folder; it prints to `log`."""
        enter = ["nsenter", "--target", self.pid, "--mount", "--net", "--pid", "--uts"]
        with log.open("ab") as file:
            return subprocess.Popen(
                [*enter, f"--wdns={ROOT}", *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def text_of(self, name: str) -> str:
        """Return what is in a file of the machine's folder, which may not be there yet."""
        return (self.folder / name).read_text() if (self.folder / name).exists() else ""

    def run(self, *words: str, seconds: float = 60) -> str:
        """Return the output of a command, which must succeed."""
        log = self.folder / "command.log"
        log.unlink(missing_ok=True)
        status = self.start(words, log).wait(seconds)
        assert status == 0, f"{shlex.join(words)} ended with {status}:\n{log.read_text()}"
        return log.read_text()

    def pids(self, word: str, variable: str = "") -> list[int]:
        """The processes with `word` in their command line and NAME=value in their environment."""
        needed = {f"MACHINE={self.folder}".encode(), *([variable.encode()] if variable else [])}
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().split(b"\0")
                variables = set((path / "environ").read_bytes().split(b"\0"))
            except OSError:  # the process has ended
                continue
            carries = os.path.basename(line[0]) in CARRIERS
            if needed <= variables and word.encode() in line and not carries:
                found.append(int(path.name))
        return found
