"""The JobSet of docs/pods.md: its command in two pods, with flags and by the Kubernetes API."""

from __future__ import annotations

import os
import pathlib
import signal
from collections.abc import Iterator

import pytest
import yaml

from tests.launchers import machine, pods
from tests.launchers.documented import OWN, PYTHON, SMALL, block, changed
from tests.launchers.pods import Pods

pytestmark = machine.skipped_without(pods.INSTALLED, "jax[k8s] or namespaces")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    with Pods(tmp_path_factory.mktemp("pods")) as started:
        yield started


def command(folder: pathlib.Path, more: str) -> str:
    found = yaml.safe_load(block("Kubernetes", "yaml"))["spec"]["replicatedJobs"][0]
    [container] = found["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/sh", "-c"]
    [script] = container["args"]
    changes = {"python": PYTHON, "/shared/runs/own": str(folder), OWN: f"{SMALL} {more}"}
    return changed(script, {**changes, "--processes.count 4": "--processes.count 2"})


def run(host: Pods, line: str) -> list[int]:
    """Start both pods, and wait for the status of each."""
    return [each.wait(240) for each in [host.start_pod(index, line) for index in range(2)]]


def test_an_evicted_pod_stops_all_and_the_same_command_goes_on(host: Pods) -> None:
    folder = host.folder / "flags"
    line = command(folder, "--steps 40 --checkpoint-every 1")
    started = [host.start_pod(index, line) for index in range(2)]
    machine.reached(folder, 5, host.text)
    [pid] = host.pids("train.py", "JOB_COMPLETION_INDEX=1")
    os.kill(pid, signal.SIGTERM)
    assert [each.wait(240) for each in started] == [143, 143], host.text()
    assert "is saved: the same command goes on from it" in host.text()
    assert run(host, line) == [0, 0], host.text()
    assert "Continuing from the checkpoint of step" in host.text()


def test_without_flags_the_pods_meet_by_the_kubernetes_api(host: Pods) -> None:
    line = command(host.folder / "api", "--steps 4").partition("--processes.coordinator")[0]
    assert run(host, line) == [1, 1], host.text()
    assert "did not meet the others: Service token file does not exist" in host.text()
    host.start_api()
    assert run(host, line) == [0, 0], host.text()
    asked = (host.folder / "api.log").read_text()
    assert all(f"podIP%3D{address}" in asked for address in pods.ADDRESSES), asked
    assert f"/jobs/{pods.JOB} " in asked
