"""A disk that cannot be written gives our error, with the file and the cure, and loses no data."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import filelock
import pytest

from configs.own_model import config as CONFIG
from lora_jax import LoraError
from lora_jax.errors import writing
from lora_jax.system.whole_files import write_together
from lora_jax.training import directory, export, metrics
from lora_jax.training.checkpoints import Checkpoints
from tests.training.test_checkpoints import LAYOUT, bits, names, read, state, write
from tests.training.test_resume import checkpoints

# If several writes fail, Orbax raises the first error; Python warns of the others when it collects
# them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

CURES = {
    errno.ENOSPC: "No space left on device. Make room on that disk",
    errno.EDQUOT: "Disk quota exceeded. Your quota of that disk is used up",
    errno.EROFS: "Read-only file system. Make the folder writable, or name another one",
    errno.ESTALE: "Stale file handle. The disk or the network file system went away",
    errno.EBUSY: "Device or resource busy. Another process has it open",
    errno.ENOLCK: "No locks available. That file system has no locks",
}


def refuse(patch: pytest.MonkeyPatch, call: str, number: int, part: str = "") -> None:
    """Make `os.<call>` fail with error `number` for paths that contain `part`."""
    plain = getattr(os, call)

    def refused(*paths: Any, **options: Any) -> Any:
        if part in str(paths[1] if call in ("rename", "replace") else paths[0]):
            raise OSError(number, os.strerror(number))
        return plain(*paths, **options)

    patch.setattr(os, call, refused)


@pytest.mark.parametrize("number", CURES)
def test_each_error_has_a_cure(number: int) -> None:
    said = rf"x/y cannot be written: {CURES[number]}.*start the same"
    with pytest.raises(LoraError, match=said), writing("x/y"):
        raise OSError(number, os.strerror(number))


def _config(folder: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, run_dir=str(folder / "run"))
    with directory.enter("own_model", config):
        pass


def _checkpoint(folder: pathlib.Path) -> None:
    write(folder / "checkpoints", max(checkpoints(folder), default=0) + 1)


def _record(folder: pathlib.Path) -> None:
    record = metrics.Record(folder)
    try:
        record.write({"step": 1, "loss": 0.5})
        record.sync()
    finally:
        record.close()


def _export(folder: pathlib.Path) -> None:
    export.save(folder, "best", LAYOUT, state(1).trained)


def _files(folder: pathlib.Path) -> None:
    write_together(folder / "peft", {"a": lambda path: path.write_text("a")})


WRITERS: dict[str, Callable[[pathlib.Path], None]] = {
    "run": _config,
    "checkpoints": _checkpoint,
    "metrics.jsonl": _record,
    "best": _export,
    "peft": _files,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder(name: str, small_disk: pathlib.Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(LoraError, match=rf"(?s){name}.*Read-only file system.*Make the folder"):
        WRITERS[name](small_disk)


@pytest.mark.parametrize("name", ["checkpoints", "best", "metrics.jsonl"])
def test_a_full_disk_and_then_room(name: str, small_disk: pathlib.Path) -> None:
    """After a full disk, earlier files are intact, and writing works once there is room."""
    WRITERS[name](small_disk)
    filler = small_disk / "filler"
    _fill(filler)
    with pytest.raises(LoraError, match=rf"(?s){name}.*No space left.*Make room on that disk"):
        _again_and_again(WRITERS[name], small_disk)
    if name == "best":
        assert bits(export.load(small_disk, "best")) == bits(state(1).trained)
    filler.unlink()
    WRITERS[name](small_disk)


def _fill(file: pathlib.Path) -> None:
    with file.open("wb", buffering=0) as opened, contextlib.suppress(OSError):
        while True:
            opened.write(bytes(2**12))


def _again_and_again(write: Callable[[pathlib.Path], None], folder: pathlib.Path) -> None:
    for _ in range(20):  # the last page of a file may have room for a few lines
        write(folder)


# ---- network file systems


def test_a_file_system_without_locks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(self: Any, timeout: float) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.raises(LoraError, match=r"run cannot be written: No locks.*on another one"):
        _config(tmp_path)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.ENOTEMPTY, errno.ESTALE])
def test_a_checkpoint_whose_rename_fails(
    number: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "checkpoints", 3, 4)
    said = r"(?s)step 5 is lost; that of step 4 is kept.*goes on from"
    with monkeypatch.context() as patch:
        refuse(patch, "rename", number, "checkpoints/5")
        refuse(patch, "replace", number, "checkpoints/5")
        with pytest.raises(LoraError, match=said):
            write(folder, 5)
    assert read(folder)[1] == {"step": 4, "text": "naïve \n"}
    write(folder, 5)
    assert names(folder) == ["4", "5"]


@pytest.mark.parametrize("part", ["best.old", "adapters/best"])
def test_an_export_whose_rename_fails(
    part: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _export(tmp_path)
    plain = os.rename

    def refused(source: Any, target: Any) -> None:
        fresh = part == "best.old" or str(source).endswith("best.new")
        if str(target).endswith(part) and fresh:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refused)
        with pytest.raises(LoraError, match=r"best cannot be written.*end that one"):
            export.save(tmp_path, "best", LAYOUT, state(2).trained)
    assert bits(export.load(tmp_path, "best")) == bits(state(1).trained)
    export.save(tmp_path, "best", LAYOUT, state(2).trained)
    assert bits(export.load(tmp_path, "best")) == bits(state(2).trained)
    assert names(tmp_path / "adapters") == ["best"]


def test_an_old_export_that_somebody_reads(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old export that cannot be deleted does not stop a new one."""
    _export(tmp_path)
    with monkeypatch.context() as patch:
        refuse(patch, "rmdir", errno.ENOTEMPTY, "best.old")
        export.save(tmp_path, "best", LAYOUT, state(2).trained)
        assert bits(export.load(tmp_path, "best")) == bits(state(2).trained)
    export.save(tmp_path, "best", LAYOUT, state(3).trained)
    assert bits(export.load(tmp_path, "best")) == bits(state(3).trained)
    assert names(tmp_path / "adapters") == ["best"]


def test_an_old_checkpoint_that_somebody_reads(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "checkpoints", 3, 4)
    with monkeypatch.context() as patch:
        refuse(patch, "rmdir", errno.ENOTEMPTY)
        write(folder, 5, 6)
    assert read(folder)[1]["step"] == 6
    write(folder, 7)
    assert read(folder)[1]["step"] == 7


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE])
def test_a_file_system_that_goes_away_is_no_damage(
    number: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "checkpoints", 3, 4)

    def away(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("lora_jax.checkpoint.folder._check_json", away)
        with pytest.raises(LoraError, match=r"checkpoints/4 cannot be read: .*start the same"):
            read(folder)
    assert names(folder) == ["3", "4"]
    assert read(folder)[1]["step"] == 4


# ---- the clock


def test_nothing_goes_by_the_clock(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(2_000_000_000, 0, -100_000))
    monkeypatch.setattr("time.time", lambda: float(next(clock)))
    folder = tmp_path / "checkpoints"
    for step in (8, 9, 10):
        write(folder, step)
        for path in (folder / str(step), *(folder / str(step)).rglob("*")):
            os.utime(path, (1e9 - 1000 * step,) * 2)
    assert names(folder) == ["10", "9"]
    assert read(folder)[1]["step"] == 10


def test_events_are_in_the_order_in_which_they_were_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard reads event files by name, so they are named in the order of writing."""
    found: list[str] = []
    for now in (2_000_000_000.0, 1_000_000_000.0, 1_000_000_000.0):
        monkeypatch.setattr("time.time", lambda now=now: now)
        _record(tmp_path)
        (new,) = set(names(tmp_path)) - {*found, "metrics.jsonl"}
        found.append(new)
    assert found == sorted(found)


# ---- open files and threads of a long run


def test_checkpoints_leave_no_open_files_and_threads(tmp_path: pathlib.Path) -> None:
    if not pathlib.Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with Checkpoints(tmp_path / "checkpoints") as ours:
        ours.save(1, state(1), {})
        ours.wait()
        before = held()
        for step in range(2, 6):
            ours.save(step, state(step), {})
        ours.wait()
        found = held()
    assert all(now <= then for now, then in zip(found, before, strict=True)), (before, found)
