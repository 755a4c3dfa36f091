"""`mpirun python train.py` under a real Open MPI; from version 5 on, processes meet by mpi4py."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator

import pytest

from tests.launchers import machine
from tests.launchers.documented import OWN, PYTHON, SMALL, block, changed
from tests.launchers.machine import Machine

INSTALLED = machine.installed("mpirun") and importlib.util.find_spec("mpi4py")
pytestmark = machine.skipped_without(INSTALLED, "Open MPI, mpi4py or namespaces")
HERE = "mpirun --allow-run-as-root --oversubscribe -n 2"  # this machine needs these options


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("mpi"), {"n1": "10.77.0.1"}) as started:
        yield started


class Run:
    """Start the command of docs/pods.md with two processes."""

    def __init__(self, host: Machine, name: str, more: str) -> None:
        self.path, self.log = host.folder / name, host.folder / f"{name}.log"
        places = {".venv/bin/python": PYTHON, "/shared/runs/own": str(self.path)}
        many = "mpirun -n 16 --map-by ppr:8:node"
        line = changed(block("Open MPI", "sh"), {many: HERE, OWN: f"{SMALL} {more}", **places})
        self.process = host.start(("sh", "-c", f"exec {line}"), self.log)

    def reach(self, step: int) -> None:
        machine.reached(self.path, step, self.log.read_text)

    def wait(self) -> int:
        return self.process.wait(240)


def test_a_run_is_preempted_and_goes_on(host: Machine) -> None:
    """A process that gets SIGTERM saves a checkpoint, and the same command continues from it."""
    run = Run(host, "run", "--steps 40 --checkpoint-every 1")
    run.reach(5)
    [pid] = host.pids("train.py", "OMPI_COMM_WORLD_RANK=1")
    os.kill(pid, signal.SIGTERM)
    assert run.wait() == 143, run.log.read_text()
    assert "is saved: the same command goes on from it" in run.log.read_text()
    run = Run(host, "run", "--steps 40")
    assert run.wait() == 0, run.log.read_text()
    assert "Continuing from the checkpoint of step" in run.log.read_text()
    assert "exiting" not in run.log.read_text(), "mpirun calls it a failure"
    assert "\x1b" not in run.log.read_text(), "it draws as on a terminal"


def test_a_killed_process_ends_the_other_with_a_clear_error(host: Machine) -> None:
    run = Run(host, "killed", "--steps 4000 --checkpoint-every 1")
    run.reach(3)
    [pid] = host.pids("train.py", "OMPI_COMM_WORLD_RANK=1")
    os.kill(pid, signal.SIGKILL)
    assert run.wait() == 137, run.log.read_text()
    assert "error: process 0 of 2: " in run.log.read_text()
