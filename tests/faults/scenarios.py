"""Scenarios to be killed: commands that write for a while, and the files that they must leave."""

from __future__ import annotations

import abc
import filecmp
import math
import pathlib
import socket
from collections.abc import Callable
from typing import Any

from lora_jax.checkpoint import storage
from lora_jax.training import export as exports
from measuring.golden_runs import write_run
from tests.training import tiny
from tests.training.forks import Fork
from tests.training.runs import OWN, ROOT
from tests.training.test_resume import assert_same, checkpoints

SMALL = ("--width", "8", "--batch-size", "8", "--steps", "60", "--checkpoint-every", "5")
# It learns slowly, so that nearly every evaluation is the best so far and exports an adapter.
SMALL += ("--evaluate-every", "10", "--optimizer.schedule", "constant")
SMALL += ("--optimizer.learning-rate", "5e-4")
HEARTBEAT = 60  # seconds until a process notices that another one is gone, at most


class Scenario(abc.ABC):
    """A command that is killed and started again until it ends.

    A place is the run directory or folder that it writes. `whole` is the place of a command that
    was never killed. A log next to each place has the text that its command prints.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        folder.mkdir(parents=True)
        self.folder, self._cache = folder, folder / "cache"
        self.whole = folder / "whole"

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
        """Start one process, which prints to a log next to `place`."""
        return Fork(line, place.with_suffix(".log"), cache=self._cache, **options)


class Run(Scenario):
    """`train.py` on a tiny network."""

    line: tuple[str, ...] = ("--config", OWN, *SMALL)
    members: tuple[str, ...] = ("",)

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
            names = {p.name for p in other.iterdir() if not p.name.startswith("events.out")}
            assert names == known, f"it left {sorted(names - known)}"
            left = sorted(p.name for p in (other / "adapters").iterdir())
            assert left == ["best", "last"], f"adapters holds {left}"
            assert not [p for p in other.rglob("*") if "tmp" in p.name], "an unfinished file stays"


def _hashes(folder: pathlib.Path) -> Any:
    """The hashes of all arrays, from the manifest of the state; each start checks them."""
    return storage.read_manifest(storage.absolute(folder), math.inf, "state").arrays


class GroupRun(Run):
    """Three members that train as one program; one of them ends before the others."""

    members = ("a", "b", "c")
    _CONFIG = """
import sys
sys.path.insert(0, {root!r})
from tests.groups.test_group_runs import A, B, C
from lora_jax.groups.config import GroupConfig
config = GroupConfig(members=(A, B, C))
"""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        file = folder / "three.py"
        file.write_text(self._CONFIG.format(root=str(ROOT)))
        self.line = ("--config", str(file))

    def state(self, place: pathlib.Path) -> Any:
        """The step of the member with the fewest steps.

        Members with more steps may go back, because the group continues from checkpoints that
        belong together.
        """
        return [min(super().state(place))]


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


class TwoProcesses(Run):
    """One run on two processes, one of which is killed; the other has to stop too."""

    line = ("--config", OWN, *SMALL, "--mesh.data", "2")

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


class Export(Scenario):
    """`lora-jax export` of a tiny Llama, in one format."""

    def __init__(self, folder: pathlib.Path, form: str) -> None:
        super().__init__(folder)
        self._form, self._run = form, folder / "run"
        write_run(self._run, "llama")

    def start(self, place: pathlib.Path, killed_at: int | None = None) -> list[Fork]:
        # The shards are small: more files give more moments at which only some of them exist.
        shards = ("--shard-gb", "1e-5") if self._form == "hf" else ()
        line = (str(self._run), "--format", self._form, "--out", str(place), *shards)
        return [self.fork(place, *line, killed_at=killed_at, command="export")]

    def state(self, place: pathlib.Path) -> Any:
        """Return whether the folder exists; raise if it is incomplete."""
        if not place.exists() or not any(place.iterdir()):
            return [0]
        _assert_same_files(self.whole, place)
        return [1]

    def is_finished(self, place: pathlib.Path) -> bool:
        """Return whether the folder already had its name when the command was killed."""
        return place.exists() and any(place.iterdir())

    def assert_same(self, place: pathlib.Path) -> None:
        _assert_same_files(self.whole, place)
        left = [p.name for p in place.parent.iterdir() if p.name.startswith(".")]
        assert not left, f"it left {left}"


def _assert_same_files(one: pathlib.Path, other: pathlib.Path) -> None:
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (one, other)]
    assert names[0] == names[1], f"an incomplete folder: {names[1]} of {names[0]}"
    files = [name for name in names[0] if (one / name).is_file()]
    _, differ, failed = filecmp.cmpfiles(one, other, files, shallow=False)
    assert not differ and not failed, f"other bytes in {differ + failed}"


def export(form: str) -> Callable[[pathlib.Path], Scenario]:
    """Return a builder of the scenario for one format, which needs its folder."""
    return lambda folder: Export(folder, form)


SCENARIOS: dict[str, Callable[[pathlib.Path], Scenario]] = {
    "single run": Run,
    "group": GroupRun,
    "quantised base": QuantisedRun,
    "two processes": TwoProcesses,
    **{f"export {form}": export(form) for form in ("hf", "peft", "gguf", "mlx", "orbax")},
}
