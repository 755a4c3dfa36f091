"""Scenarios of the commands that train nothing, and the table of all scenarios."""

from __future__ import annotations

import filecmp
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from lora_jax.checkpoint import adapter_path, restore, storage
from measuring.golden_runs import GOLDEN, write_run
from tests.faults.scenarios import (
    SMALL,
    TESTED,
    ChatRun,
    FromRun,
    GroupRun,
    PairsRun,
    QuantisedRun,
    Run,
    Scenario,
    Sweep,
    TwoProcesses,
)
from tests.training.forks import Fork
from tests.training.test_resume import assert_same


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
        if not self.is_finished(place):
            return [0]
        assert_same_files(self.whole, place)
        return [1]

    def is_finished(self, place: pathlib.Path) -> bool:
        """Return whether the folder already had its name when the command was killed."""
        return place.exists() and any(place.iterdir())

    def assert_same(self, place: pathlib.Path) -> None:
        assert_same_files(self.whole, place)
        left = [p.name for p in place.parent.iterdir() if p.name.startswith(".")]
        assert not left, f"it left {left}"


def assert_same_files(one: pathlib.Path, other: pathlib.Path) -> None:
    """Raise unless two folders hold the same files with the same bytes."""
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (one, other)]
    assert names[0] == names[1], f"an incomplete folder: {names[1]} of {names[0]}"
    files = [name for name in names[0] if (one / name).is_file()]
    _, differ, failed = filecmp.cmpfiles(one, other, files, shallow=False)
    assert not differ and not failed, f"other bytes in {differ + failed}"


class Import(Scenario):
    """`lora-jax import` of a PEFT folder. A kill leaves a whole adapter or none."""

    marks = ("lock", "adapters", "adapters/best", "adapters/best/meta")
    _more: tuple[str, ...] = ()

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        run, peft = folder / "run", folder / "peft"
        write_run(run, "llama")
        to = ("--format", "peft", "--out", str(peft))
        self._peft = self.prepare("peft", str(run), *to, command="export")

    def start(self, place: pathlib.Path, killed_at: int | None = None) -> list[Fork]:
        line = (str(self._peft), "--base", str(GOLDEN / "llama"), "--out", str(place), *self._more)
        return [self.fork(place, *line, killed_at=killed_at, command="import")]

    def state(self, place: pathlib.Path) -> Any:
        """Return whether there is an adapter; raise if it is another one or damaged."""
        found = adapter_path.adapter_in(storage.folder_at(place))
        if found is None:
            return [0]
        assert_same(_contents(self.whole / "adapters/best"), _contents(found))
        return [1]

    def is_finished(self, place: pathlib.Path) -> bool:
        """Return whether the adapter already had its name when the command was killed."""
        return (place / "adapters/best").exists()

    def assert_same(self, place: pathlib.Path) -> None:
        assert_same_adapter(self.whole, place)


def assert_same_adapter(one: pathlib.Path, other: pathlib.Path) -> None:
    """Raise unless the second import has the adapter of the first and nothing else."""
    assert_same(*(_contents(place / "adapters/best") for place in (one, other)))
    left = sorted(str(p.relative_to(other)) for p in (*other.iterdir(), *other.glob("*/*")))
    assert left == ["adapters", "adapters/best", "lock"], f"it left {left}"


def _contents(folder: pathlib.Path) -> Any:
    """Everything that an adapter's folder says, once its arrays have the hashes in it."""
    storage_folder = storage.absolute(folder)
    manifest = storage.read_manifest(storage_folder, None)
    layout, parameters, trainable = restore(folder)
    return {"notes": manifest.notes, "arrays": [parameters, trainable], "layout": layout.to_json()}


class ImportOver(Import):
    marks = ("adapters/best.new", "adapters/best.old")
    _more = ("--overwrite",)

    def before(self, place: pathlib.Path) -> None:
        shutil.copytree(self.whole, place)

    def start(self, place: pathlib.Path, killed_at: int | None = None) -> list[Fork]:
        if not place.exists() and place != self.whole:
            self.before(place)
        return super().start(place, killed_at)

    def is_finished(self, place: pathlib.Path) -> bool:
        return False


class Report(Scenario):
    """`lora-jax report` of a finished run: after a kill, each file is whole or missing."""

    def __init__(self, folder: pathlib.Path) -> None:
        super().__init__(folder)
        run_dir = ("--run-dir", str(folder / "run"))
        self._run = self.prepare("run", "--config", TESTED, *SMALL, *run_dir)

    @property
    def marks(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(sorted(p.name for p in self.whole.iterdir()))

    def start(self, place: pathlib.Path, killed_at: int | None = None) -> list[Fork]:
        line = (str(self._run), "--out", str(place))
        return [self.fork(place, *line, killed_at=killed_at, command="report")]

    def state(self, place: pathlib.Path) -> Any:
        """Return which files exist; raise if one of them is incomplete."""
        names = [name for name in self.marks if (place / name).exists()]
        _, differ, failed = filecmp.cmpfiles(self.whole, place, names, shallow=False)
        assert not differ and not failed, f"other bytes in {differ + failed}"
        return [name in names for name in self.marks]

    def assert_same(self, place: pathlib.Path) -> None:
        assert_same_files(self.whole, place)


def export(form: str) -> Callable[[pathlib.Path], Scenario]:
    """Return a builder of the scenario for one format, which needs its folder."""
    return lambda folder: Export(folder, form)


SCENARIOS: dict[str, Callable[[pathlib.Path], Scenario]] = {
    "single run": Run,
    "from": FromRun,
    "group": GroupRun,
    "sweep": Sweep,
    "quantised base": QuantisedRun,
    "conversations": ChatRun,
    "pairs": PairsRun,
    "two processes": TwoProcesses,
    **{f"export {form}": export(form) for form in ("hf", "peft", "gguf", "mlx", "orbax")},
    "import": Import,
    "import over": ImportOver,
    "report": Report,
}
