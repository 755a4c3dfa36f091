"""The script of docs/pods.md under a real SLURM: two nodes with a process of four devices each."""

from __future__ import annotations

import os
import pathlib
import re
import signal
from collections.abc import Iterator

import pytest

from lora_jax.training import export, metrics
from tests.launchers import machine, slurm
from tests.launchers.documented import OWN, PYTHON, SMALL, block, changed
from tests.launchers.machine import wait_for
from tests.training.test_resume import assert_same

pytestmark = machine.skipped_without(slurm.INSTALLED, "SLURM or namespaces")
SIZE = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")  # options win over the script's
STEPS = 80


class Jobs:
    """Runs of the documented script on a cluster."""

    def __init__(self, cluster: slurm.Slurm) -> None:
        self.cluster = cluster
        self.cluster.environment["SCRATCH"] = str(cluster.folder)

    def path(self, name: str) -> pathlib.Path:
        return self.cluster.folder / "runs" / name

    def log(self, name: str) -> str:
        return self.cluster.text_of(f"{name}.log")

    def submit(self, name: str, more: str = "") -> str:
        script = changed(
            block("A SLURM cluster with GPUs", "sh"),
            {".venv/bin/python": PYTHON, "runs/own": f"runs/{name}", OWN: f"{SMALL} {more}"},
        )
        return self.cluster.submit(script, *SIZE, f"--output={self.cluster.folder}/{name}.log")

    def reach(self, name: str, step: int) -> None:
        machine.reached(self.path(name), step, lambda: self.log(name))

    def task(self, index: int) -> int:
        """Return the process of a task of the running job."""
        [pid] = self.cluster.pids("train.py", f"SLURM_PROCID={index}")
        return pid

    def wait(self, job: str, name: str) -> str:
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return wait_for(
            lambda: (found := self.cluster.field(job, "JobState")) in ends and found,
            lambda: self.log(name),
        )


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    with slurm.Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield Jobs(cluster)


def test_a_job_that_is_preempted_and_loses_a_node_ends_with_the_same_bits(jobs: Jobs) -> None:
    """A run that is preempted and loses a node ends with the bits of an undisturbed run."""
    whole = jobs.submit("whole", f"--steps {STEPS}")
    assert jobs.wait(whole, "whole") == "COMPLETED", jobs.log("whole")
    stopped = jobs.submit("stopped", f"--steps {STEPS} --checkpoint-every 1")
    jobs.reach("stopped", 10)
    jobs.cluster.run("scancel", "--signal=TERM", stopped)
    jobs.reach("stopped", 25)
    jobs.cluster.kill_node("n2", jobs.task(1))
    wait_for(
        lambda: jobs.cluster.field(stopped, "JobState") == "PENDING", lambda: jobs.log("stopped")
    )
    jobs.cluster.start_node("n2")
    assert jobs.wait(stopped, "stopped") == "COMPLETED", jobs.log("stopped")
    assert int(jobs.cluster.field(stopped, "Restarts")) >= 2
    text = jobs.log("stopped")
    saved = int(text.partition("SIGTERM: step ")[2].split()[0])
    starts = [int(x) for x in re.findall(r"Continuing from the checkpoint of step (\d+)", text)]
    assert 10 <= saved == starts[0] < 25 <= starts[1] < STEPS, starts
    for name in ("best", "last"):
        assert_same(*(export.load(jobs.path(run), name) for run in ("whole", "stopped")))
    record = [[x["loss"] for x in metrics.read(jobs.path(run))] for run in ("whole", "stopped")]
    assert record[0] == record[1]


def test_a_killed_task_ends_the_other_with_a_clear_error(jobs: Jobs) -> None:
    job = jobs.submit("killed", "--steps 4000 --checkpoint-every 1")
    jobs.reach("killed", 3)
    os.kill(jobs.task(0), signal.SIGKILL)
    assert jobs.wait(job, "killed") == "FAILED"
    text = jobs.log("killed")
    assert "error: process 1 of 2: " in text, text
    assert "Start all of them again with the same command" in text
