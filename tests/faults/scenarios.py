"""Scenarios to be killed: commands that write for a while, and the files that they must leave."""

from __future__ import annotations

import abc
import csv
import json
import math
import pathlib
import socket
from typing import Any

from tensorboardX.proto import event_pb2

from lora_jax.checkpoint import storage
from lora_jax.training import directory
from lora_jax.training import export as exports
from tests.training import tiny
from tests.training.forks import Fork
from tests.training.runs import ROOT
from tests.training.test_resume import assert_same, checkpoints

TESTED = str(ROOT / "tests/faults/tested.py")
SMALL = ("--width", "8", "--batch-size", "8", "--steps", "60", "--checkpoint-every", "5")
# It learns slowly, so that nearly every evaluation is the best so far and exports an adapter.
SMALL += ("--evaluate-every", "10", "--optimizer.schedule", "constant")
SMALL += ("--optimizer.learning-rate", "5e-4")
HEARTBEAT = 60  # seconds until a process notices that another one is gone, at most


class Scenario(abc.ABC):
    """A command that is killed and started again until it ends."""

    marks: tuple[str, ...] = ()  # files of a place, right after which some of the kills come

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self._cache = folder, folder / "cache"
        self.whole = folder / "whole"

    def before(self, place: pathlib.Path) -> None:  # noqa: B027 - most need nothing
        """Write what must be at `place` before the first start."""

    @abc.abstractmethod
    def start(self, place: pathlib.Path, killed_at: int | None = None) -> list[Fork]:
        """Start the command's processes; the first one dies at the change `killed_at`."""

    @abc.abstractmethod
    def state(self, place: pathlib.Path) -> Any:
        """Return the state after a kill, which must not be less than before; raise if torn."""

    def is_finished(self, place: pathlib.Path) -> bool:
        """Return whether the command would find nothing left to do and end with an error."""
        return False

    @abc.abstractmethod
    def assert_same(self, place: pathlib.Path) -> None:
        """Raise unless the killed command has ended with the files of `whole`."""

    def fork(self, place: pathlib.Path, *line: str, **options: Any) -> Fork:
        """Start one process, which prints to a log in `folder`, named after `place`."""
        return Fork(line, self.folder / f"{place.name}.log", cache=self._cache, **options)

    def prepare(self, name: str, *line: str, **options: Any) -> pathlib.Path:
        """Run a command that writes what the scenario's own command reads; return its folder."""
        place = self.folder / name
        made = self.fork(place, *line, **options)
        assert made.wait() == 0, made.log.read_text()[-3000:]
        return place


class Run(Scenario):
    """`train.py` on a tiny network."""

    line: tuple[str, ...] = ("--config", TESTED, *SMALL)
    members: tuple[str, ...] = ("",)
    marks = ("metrics.jsonl", "adapters/last", "curves.png", "summary.json")

    def start(self, place: pathlib.Path, killed_at: int | None = None) -> list[Fork]:
        return [self.fork(place, *self.line, "--run-dir", str(place), killed_at=killed_at)]

    def state(self, place: pathlib.Path) -> Any:
        """The steps of the newest checkpoints; none is damaged, and exports can be read."""
        found = {}
        for member in self.members:
            path = place / member
            found[member] = max(checkpoints(path), default=0)
            assert not list(path.glob("checkpoints/damaged-*")), "a checkpoint was damaged"
            for name in ("best", "last"):
                if (path / "adapters" / name).exists():
                    exports.load(path, name)
        return [found[member] for member in self.members]

    def assert_same(self, place: pathlib.Path) -> None:
        for member in self.members:
            one, other = self.whole / member, place / member
            texts = [(p / "metrics.jsonl").read_bytes() for p in (one, other)]
            assert texts[0] == texts[1], "the records differ"
            for name in ("best", "last"):
                assert_same(exports.load(one, name), exports.load(other, name))
            step = max(checkpoints(one))
            assert _hashes(one / f"checkpoints/{step}") == _hashes(other / f"checkpoints/{step}")
            known = {"lock", "config.json", "metrics.jsonl", "checkpoints", "adapters"}
            known |= {"summary.json", "curves.png"}
            assert_same(*(_stable(directory.summary(p) or {}) for p in (one, other)))
            assert events(one) == events(other), "TensorBoard shows other numbers"
            names = {p.name for p in other.iterdir() if not p.name.startswith("events.out")}
            assert names == known, f"it left {sorted(names - known)}"
            left = sorted(p.name for p in (other / "adapters").iterdir())
            assert left == ["best", "last"], f"adapters holds {left}"
            assert not [p for p in other.rglob("*") if "tmp" in p.name], "an unfinished file stays"


def _stable(summary: dict[str, Any]) -> dict[str, Any]:
    """The values of a summary that are the same whenever and wherever it was written."""
    varying = ("_seconds", "_per_second", "memory_bytes", "device_peak_bytes")
    varying += ("adapter_file_bytes",)  # the length of the path is in the files
    return {n: x for n, x in summary.items() if n != "run" and not n.endswith(varying)}


def events(run: pathlib.Path) -> set[tuple[str, int, float]]:
    """Read (tag, step, value) from the events of a run as TensorBoard does, file after file."""
    found = set[tuple[str, int, float]]()
    for file in sorted(run.glob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at + 12 <= len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            if at + 16 + size > len(data):
                break  # a kill left the last one incomplete
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            if event.session_log.status == event_pb2.SessionLog.START:
                found = {one for one in found if one[1] < event.step}
            found |= {(x.tag, event.step, x.simple_value) for x in event.summary.value}
            at += 16 + size
    return found


def _hashes(folder: pathlib.Path) -> Any:
    """The hashes of all arrays, from the manifest of the state; each start checks them."""
    return storage.read_manifest(storage.absolute(folder), math.inf, "state").arrays


class GroupRun(Run):
    """Three members that train as one program; one of them ends before the others."""

    members = ("a", "b", "c")
    _CONFIG = """
import sys
sys.path.insert(0, {root!r})
import dataclasses
from tests.faults.tested import workload
from tests.sweeps.test_group_runs import A, B, C
from lora_jax.sweeps.config import GroupConfig, Member
config = GroupConfig(
    members=tuple(
        Member(m.name, dataclasses.replace(m.config, workload=workload)) for m in (A, B, C)
    )
)
"""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        file = folder / "three.py"
        file.write_text(self._CONFIG.format(root=str(ROOT)))
        self.line = ("--config", str(file))

    def state(self, place: pathlib.Path) -> Any:
        """The step of the member with the fewest steps."""
        return [min(super().state(place))]

    def assert_same(self, place: pathlib.Path) -> None:
        super().assert_same(place)
        names = {p.name for p in place.iterdir()}
        known = {*self.members, "checkpoints.json", "results.csv", "results.json", "results.png"}
        assert names == known, f"it left {sorted(names ^ known)}"
        assert_same(*map(_results, (self.whole, place)))


def _results(path: pathlib.Path) -> dict[str, Any]:
    """The results of a group, without what is another number in each run."""
    found = json.loads((path / "results.json").read_text())
    with (path / "results.csv").open(newline="") as file:
        lines = [_stable(line) for line in csv.DictReader(file)]
    members = [_stable(member) for member in found.pop("members")]
    picture = (path / "results.png").read_bytes()
    return {**found, "members": members, "lines": lines, "picture": hash(picture)}


class Sweep(GroupRun):
    """A sweep over two fields; half of its members end long before the others."""

    _CONFIG = """
import sys
sys.path.insert(0, {root!r})
import dataclasses
from tests.faults.tested import workload
from tests.sweeps.test_group_runs import A
from lora_jax.sweeps.sweep import SweepConfig
config = SweepConfig(
    base=dataclasses.replace(A.config, workload=workload),
    grid={{"optimizer.learning_rate": (1e-2, 3e-3), "steps": (10, 150)}},
)
"""

    @property
    def members(self) -> tuple[str, ...]:  # type: ignore[override]
        """The run directories, which are named after the values."""
        return tuple(sorted(p.name for p in self.whole.iterdir() if p.is_dir()))

    @property
    def marks(self) -> tuple[str, ...]:  # type: ignore[override]
        inside = (f"{m}/{name}" for m in self.members for name in Run.marks)
        return (*inside, "checkpoints.json", "results.json", "results.csv", "results.png")


class FromRun(Run):
    """A run that begins with the adapter of an earlier one."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        run_dir = ("--run-dir", str(folder / "earlier"))
        earlier = self.prepare("earlier", "--config", TESTED, *SMALL, "--steps", "10", *run_dir)
        self.line = (*Run.line, "--from", str(earlier))


class QuantisedRun(Run):
    """A tiny Llama in NF4, with doubly quantised scales."""

    _CONFIG = """
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.config import LoraConfig, OptimizerConfig
from lora_jax.data.config import DataConfig
from lora_jax.training.text import ModelConfig, TextConfig

config = TextConfig(
    workload=causal_lm,
    model=ModelConfig(reference={model!r}, quantize="nf4"),
    data=DataConfig(
        source={data!r},
        prompt="{{text}}",
        answer=" {{label}} word1 word2",
        eos="</s>",
        batch_size=4,
        eval_batch_size=8,
        max_length=16,
    ),
    lora=LoraConfig(rank=4, targets=("**/kernel",)),
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
    steps=15,
    evaluate_every=5,
    checkpoint_every=5,
)
"""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        model = tiny.write_model(folder / "model", tiny.LLAMA)
        data = tiny.write_examples(folder / "data", ("text",), int)
        file = folder / "quantised.py"
        file.write_text(self._CONFIG.format(model=str(model), data=data))
        self.line = ("--config", str(file))


class ChatRun(Run):
    """A tiny Llama on packed conversations, with samples at each evaluation."""

    workload, data = "causal_lm", "chats"
    _CONFIG = """
from lora_jax.data.config import DataConfig
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.config import LoraConfig, OptimizerConfig
from lora_jax.training.preferences import PreferenceConfig, preferences
from lora_jax.training.text import ModelConfig, SamplesConfig, TextConfig

config = {kind}(
    workload={workload},
    model=ModelConfig(reference={base!r}),
    data=DataConfig(source={data!r}, batch_size=4, eval_batch_size=8, max_length=96),
    lora=LoraConfig(rank=4, targets=("**/kernel",), dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-3, schedule="constant"),
    samples=SamplesConfig(prompts=3, new_tokens=8),
    steps=15,
    evaluate_every=5,
    checkpoint_every=5,
)
"""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        found = tiny.write_chat(folder / "chat")
        kind = {"causal_lm": "TextConfig", "preferences": "PreferenceConfig"}[self.workload]
        values = {"base": found["base"], "data": found[self.data]}
        text = self._CONFIG.format(kind=kind, workload=self.workload, **values)
        (folder / "chat.py").write_text(text)
        self.line = ("--config", str(folder / "chat.py"))


class PairsRun(ChatRun):
    """A tiny Llama on pairs of answers, from an adapter, which is the reference."""

    workload, data = "preferences", "pairs"

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        earlier = ("--run-dir", str(folder / "earlier"), "--steps", "5")
        self.line += ("--from", str(self.prepare("earlier", *self.line, *earlier)))


class TwoProcesses(Run):
    """One run on two processes, one of which is killed; the other has to stop too."""

    line = (*Run.line, "--mesh.data", "2")

    def start(self, place: pathlib.Path, killed_at: int | None = None) -> list[Fork]:
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = int(found.getsockname()[1])
        flags = ("--processes.coordinator", f"localhost:{port}", "--processes.count", "2")
        flags += ("--processes.heartbeat-timeout", str(HEARTBEAT), "--run-dir", str(place))
        flags += ("--processes.connect-timeout", str(2 * HEARTBEAT))
        return [
            Fork(
                (*self.line, *flags, "--processes.index", str(index)),
                place.with_suffix(f".{index}.log"),
                cache=self._cache,
                killed_at=killed_at if index == 0 else None,
            )
            for index in range(2)
        ]
