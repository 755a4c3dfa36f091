"""Several processes as one run: the same curve, shared checkpoints, and clear errors."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import sys
import types
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax.training import export, metrics, processes
from lora_jax.training.config import ConfigError, ProcessesConfig
from tests.training import tiny
from tests.training.forks import Fork
from tests.training.runs import OWN
from tests.training.test_resume import checkpoints

MESH = ("--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2")
SMALL = ("--config", OWN, "--width", "16", "--batch-size", "32", "--evaluate-every", "40")
STEPS = 160
RUN = (*SMALL, *MESH, "--steps", str(STEPS))
SECONDS = 10  # heartbeat timeout: the longest time until a lost process is noticed


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


class Place:
    """A folder for runs, which start as one process of eight devices or as two of four."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self._cache = folder, folder / "cache"

    def one(self, name: str, *arguments: str) -> Fork:
        log = self.folder / f"{name}.log"
        line = (*arguments, "--run-dir", str(self.folder / name))
        return Fork(line, log, cache=self._cache, devices=8)

    def two(self, name: str, *arguments: str, each: tuple[tuple[str, ...], ...] = ()) -> list[Fork]:
        port = free_port()
        place = ("--run-dir", str(self.folder / name))
        flags = ("--processes.coordinator", f"localhost:{port}", "--processes.count", "2")
        flags = (*flags, "--processes.heartbeat-timeout", str(SECONDS))
        forks = []
        for index in range(2):
            own = each[index] if each else ()
            line = (*arguments, *place, *flags, "--processes.index", str(index), *own)
            log = self.folder / f"{name}.{index}.log"
            forks.append(Fork(line, log, cache=self._cache, devices=4))
        return forks


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("processes"))


def end_well(*forks: Fork) -> None:
    for fork in forks:
        assert fork.wait() == 0, fork.log.read_text()


def losses(path: pathlib.Path) -> dict[tuple[int, str], float]:
    lines = metrics.read(path)
    found = {(line["step"], line.get("split", "train")): line["loss"] for line in lines}
    assert len(found) == len(lines), "a step or an evaluation is there twice"
    return found


def assert_same_curve(one: pathlib.Path, two: pathlib.Path, steps: int) -> None:
    expected, found = losses(one), losses(two)
    assert [step for step, split in expected if split == "train"] == list(range(1, steps + 1))
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


class Broken:
    """A run that is stopped in every way, and goes on with other processes each time.

    after: the newest checkpoint after each stop.
    printed: the output of the processes that were not killed themselves, in the order of the stops.
    """

    NAME = "broken"

    def __init__(self, place: Place) -> None:
        self.path = place.folder / self.NAME
        self.after: list[int] = []
        self.printed: list[str] = []
        self.statuses: list[int] = []
        self._often = (*RUN, "--checkpoint-every", "1")  # slow steps, which a signal can hit
        for victim in (1, 0):
            forks = place.two(self.NAME, *self._often)
            self._reach(forks[0], 10)
            forks[victim].send(signal.SIGKILL)
            self._stopped([forks[1 - victim]], "error: process")
        fork = place.one(self.NAME, *self._often)
        self._reach(fork, 10)
        fork.send(signal.SIGTERM)
        self._stopped([fork], "SIGTERM: step")
        forks = place.two(self.NAME, *self._often)
        self._reach(forks[0], 5)
        forks[1].send(signal.SIGTERM)
        self._stopped(forks, "SIGTERM: step")
        end_well(*place.two(self.NAME, *RUN))

    def _reach(self, fork: Fork, more: int) -> None:
        wanted = max(checkpoints(self.path), default=0) + more
        reached = fork.until(lambda: max(checkpoints(self.path), default=0) >= wanted)
        assert reached, fork.log.read_text()

    def _stopped(self, forks: list[Fork], says: str) -> None:
        """Wait until the processes end, and until the first has printed `says`."""
        self.statuses += [fork.wait(SECONDS + 60) for fork in forks]
        self.printed.append(forks[0].printed(says))
        self.after.append(max(checkpoints(self.path)))


@pytest.fixture(scope="module")
def whole(place: Place) -> pathlib.Path:
    end_well(place.one("whole", *RUN))
    return place.folder / "whole"


@pytest.fixture(scope="module")
def broken(place: Place) -> Broken:
    return Broken(place)


@pytest.mark.slow
def test_a_run_of_other_processes_each_time_has_the_same_curve(
    whole: pathlib.Path, broken: Broken
) -> None:
    """One process restores the checkpoints of two and vice versa; no step is lost or repeated."""
    assert_same_curve(whole, broken.path, STEPS)
    for name in ("best", "last"):
        one, other = (jax.tree.leaves(export.load(p, name)) for p in (whole, broken.path))
        for x, y in zip(one, other, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_each_start_went_on_from_the_checkpoint_of_the_one_before(broken: Broken) -> None:
    assert broken.after == sorted(set(broken.after)), broken.after
    assert broken.after[-1] < STEPS, "the run ended before it could be stopped"
    text = "".join(p.read_text() for p in broken.path.parent.glob(f"{broken.NAME}*.log"))
    for step in broken.after:
        assert f"Continuing from the checkpoint of step {step}." in text


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_a_clear_error(broken: Broken) -> None:
    """Process 0 ends by the broken connection and process 1 by JAX's abort, soon after SECONDS."""
    assert all(status not in (0, processes.PREEMPTED) for status in broken.statuses[:2])
    for index, text in enumerate(broken.printed[:2]):
        assert f"error: process {index} of 2: " in text, text
        assert "the same command: the run goes on from its last checkpoint" in text


@pytest.mark.slow
def test_sigterm_saves_the_step_in_hand_and_says_so(broken: Broken) -> None:
    """A run of one process stops by itself; of two processes only process 1 gets the signal, and
    both stop together."""
    assert broken.statuses[2:] == [143, 143, 143]
    for text, step in zip(broken.printed[2:], broken.after[2:], strict=True):
        assert f"SIGTERM: step {step} is saved" in text


@pytest.mark.slow
def test_only_process_0_prints_and_writes(broken: Broken) -> None:
    log = broken.path.parent / f"{broken.NAME}.1.log"
    lines = [line for line in log.read_text().splitlines() if "broken" in line]
    assert not [line for line in lines if "adapted parameters" in line], lines
    assert json.loads((broken.path / "summary.json").read_text())["processes"] == 2
    names = {p.name for p in broken.path.iterdir() if not p.name.startswith("events.out")}
    known = {"lock", "config.json", "metrics.jsonl", "checkpoints", "adapters", "summary.json"}
    assert names == known | {"curves.png"}


TEXT = """
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.config import LoraConfig, OptimizerConfig
from lora_jax.data.config import DataConfig
from lora_jax.training.text import ModelConfig, TextConfig

config = TextConfig(
    workload=causal_lm,
    model=ModelConfig(reference={model!r}),
    data=DataConfig(
        source={data!r},
        prompt="{{text}}",
        answer=" {{label}} word1 word2",
        eos="</s>",
        batch_size=8,
        eval_batch_size=16,
        max_length=16,
    ),
    lora=LoraConfig(rank=4, targets=("**/kernel",)),
    optimizer=OptimizerConfig(learning_rate=3e-2),
    steps=8,
    evaluate_every=4,
)
"""


@pytest.mark.slow
def test_a_text_model_has_the_same_curve_on_two_processes(place: Place) -> None:
    """Batches of text weigh unequally: each loss is a mean over the tokens of both processes."""
    description = tiny.LLAMA | {"num_key_value_heads": 2}  # mesh.tensor divides this number
    model = tiny.write_model(place.folder / "model", description)
    data = tiny.write_examples(place.folder / "data", ("text",), int)
    config = place.folder / "text.py"
    config.write_text(TEXT.format(model=str(model), data=data))
    line = ("--config", str(config), *MESH)
    end_well(place.one("text-one", *line), *place.two("text-two", *line))
    assert_same_curve(place.folder / "text-one", place.folder / "text-two", 8)
    printed = (place.folder / "text-two.0.log").read_text()
    assert "8 devices (cpu) in 2 processes, as data 2 x fsdp 2 x tensor 2" in printed
    assert "8 rows a step, 2 on each device" in printed and "4 read by each process" in printed
    assert (place.folder / "text-two.1.log").read_text() == ""  # it prints only its errors


@pytest.mark.slow
def test_processes_that_were_started_differently_refuse_to_run(place: Place) -> None:
    forks = place.two("unlike", *RUN, each=(("--seed", "1"), ("--seed", "2")))
    assert [fork.wait() for fork in forks] != [0, 0]
    text = "".join(fork.log.read_text() for fork in forks)
    assert "seed: 1 -> 2" in text
    assert not (place.folder / "unlike").exists(), "the run began in spite of the error"


# ---- without other processes


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        (dict.fromkeys(processes._SLURM, "8"), "SLURM"),
        (dict.fromkeys(processes._SLURM, "8") | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "8", "SLURM_NTASKS": "8"}, None),  # a batch script, not a step of srun
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
        ({"MEGASCALE_NUM_SLICES": "2"}, "Cloud TPU"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
    ],
)
def test_the_launcher_is_read_off_the_environment(
    variables: dict[str, str], found: str | None
) -> None:
    assert processes.launcher({"TPU_SKIP_MDS_QUERY": "1"} | variables) == found


def test_one_process_connects_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it connects"))
    processes.join(ProcessesConfig())
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    processes.join(ProcessesConfig(count=1))
    assert not jax.distributed.is_initialized()


def test_a_launcher_or_the_flags_lead_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(processes, "LAST", processes.LastWords())
    for name in processes._SLURM:
        monkeypatch.setenv(name, "8")
    processes.join(ProcessesConfig(connect_timeout=7))
    processes.join(ProcessesConfig(coordinator="host:1", count=2, index=1))
    processes.LAST.leave()
    (detected, options), (told, more) = calls
    assert detected == (None, None, None)
    assert (options["cluster_detection_method"], options["initialization_timeout"]) == (None, 7)
    assert told == ("host:1", 2, 1)
    assert more["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize("kind", [RuntimeError, type("OfAnotherPackage", (Exception,), {})])
def test_failing_to_meet_names_the_cure(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise kind("no route to host")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(processes, "LAST", processes.LastWords())
    with pytest.raises(ConfigError, match=r"(?s)no route to host.*--processes\.connect-timeout"):
        processes.join(ProcessesConfig(coordinator="host:1", count=2, index=1))
    processes.LAST.leave()


def test_mpi_is_finalized_by_whom_it_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mpirun` reports a failure if MPI is not finalized; a config may have begun MPI itself."""
    ended: list[bool] = []
    mpi = types.SimpleNamespace(Finalize=lambda: ended.append(True))
    begin = lambda *_, **__: monkeypatch.setitem(sys.modules, "mpi4py.MPI", mpi)  # noqa: E731
    monkeypatch.setattr(jax.distributed, "initialize", begin)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(processes, "LAST", processes.LastWords())
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    for _ in range(2):
        processes.join(ProcessesConfig())
    processes.LAST.leave()
    assert ended == [True]


@pytest.mark.parametrize(
    ("variables", "package"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpi4py"),
        ({"KUBERNETES_SERVICE_HOST": "1", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
    ],
)
def test_a_launcher_that_needs_a_package_says_which(
    variables: dict[str, str], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(processes, "LAST", processes.LastWords())
    with pytest.raises(ConfigError, match=rf"(?s){package}.*--processes\.count 1"):
        processes.join(ProcessesConfig())
    processes.LAST.leave()


@pytest.mark.parametrize(
    "values",
    [
        {"count": 2},
        {"coordinator": "host:1"},
        {"coordinator": "host", "count": 2, "index": 0},
        {"coordinator": "host:1", "count": 2, "index": 2},
        {"heartbeat_timeout": 0},
    ],
)
def test_flags_that_say_too_little_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="processes"):
        ProcessesConfig(**values)


def test_states_of_two_processes_are_put_together() -> None:
    states = [{"step": 3, "at": {"0": [1, 2]}}, {"step": 3, "at": {"1": [4]}}]
    assert processes.union(states) == {"step": 3, "at": {"0": [1, 2], "1": [4]}}
    with pytest.raises(lora_jax.LoraError, match=r"3 and 4 for state\['step'\]"):
        processes.union([{"step": 3}, {"step": 4}])


def test_only_the_first_sigterm_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGTERM that is sent twice at once counts once; a later one kills, as by default."""
    sent: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with processes.Preemption() as preemption:
        assert not preemption.asked(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.asked(2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        monkeypatch.setattr(processes, "_REPEATED", 0)
        with monkeypatch.context() as patch:
            patch.setattr(processes.os, "kill", lambda _, number: sent.append(number))
            signal.raise_signal(signal.SIGTERM)
        assert sent == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before
