"""Commands write through no link below the folder that the user named."""

from __future__ import annotations

import os
import pathlib
import shutil
import stat

import pytest

from lora_jax import LoraError
from lora_jax.__main__ import main
from lora_jax.system import whole_files
from tests.formats import RUN
from tests.fuzz.kind import FORMATS, GOLDEN

CONFIG = str(FORMATS / "small.py")
PEFT = GOLDEN / "golden_peft" / "bert"
BASE = GOLDEN / "golden_models" / "bert"
TRAIN = ["train", "--config", CONFIG, "--run-dir"]

# Name -> the folder that is prepared, the command, and the entries that it writes.
COMMANDS = {
    "train": (None, TRAIN, (
        *("config.json", "metrics.jsonl", "summary.json", "curves.png", "lock", "error.txt"),
        *("checkpoints", "checkpoints/4", "checkpoints/8", "adapters", "adapters/best"),
        *("adapters/last", "adapters/best.new", "adapters/best.old"),
        "events.out.tfevents.9999999999.host",
    )),
    "sweep": (None, [*TRAIN[:2], f"{CONFIG}:sweep", "--run-dir"], (
        *("results.json", "results.csv", "results.png", "checkpoints.json", "rank=1"),
        *("rank=2/adapters", "rank=1/metrics.jsonl", "rank=1/config.json", "rank=1/lock"),
    )),
    "report": (RUN, ["report"], (
        *("report", "report/report.md", "report/report.html", "report/loss.png"),
        *("report/report.md.tmp", "report/report.html.tmp"),
    )),
    "import": (None, ["import", str(PEFT), "--base", str(BASE), "--out"], (
        *("lock", "adapters", "adapters/best", "adapters/best.new"),
    )),
}  # fmt: skip
CASES = [
    pytest.param(name, entry, marks=[pytest.mark.slow] * (name == "sweep"))
    for name, (_, _, entries) in COMMANDS.items()
    for entry in entries
]


@pytest.mark.few(8)
@pytest.mark.standard_promotion
@pytest.mark.parametrize(("name", "entry"), CASES)
def test_no_command_writes_through_a_link(
    name: str, entry: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, command, _ = COMMANDS[name]
    run, outside = tmp_path / "run", tmp_path / "outside"
    if before is not None:
        shutil.copytree(before, run)
    (outside / "folder").mkdir(parents=True)
    (outside / "file").write_text("mine")
    target = "file" if "." in entry.replace("best.", "") or "lock" in entry else "folder"
    (run / entry).parent.mkdir(parents=True, exist_ok=True)
    (run / entry).symlink_to(outside / target)
    status = main_of([*command, str(run)])
    assert sorted(path.name for path in outside.rglob("*")) == ["file", "folder"]
    assert (outside / "file").read_text() == "mine"
    said = capsys.readouterr()
    assert status == 0 or (status == 1 and "error:" in said.err), said


def main_of(arguments: list[str]) -> int:
    if arguments[0] != "train":
        return main(arguments)
    import train

    return train.main(arguments[1:])


def test_a_whole_file_replaces_a_link(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    whole_files.write(tmp_path / "link", b"new")
    assert (tmp_path / "link").read_bytes() == b"new" and not (tmp_path / "link").is_symlink()
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("depth", [1, 2])
def test_a_whole_file_enters_no_link(depth: int, tmp_path: pathlib.Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    link = tmp_path / "run" / "/".join("ab"[:depth])
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    with pytest.raises(LoraError, match="nothing is written through a link"):
        whole_files.write(link / "c" / "file", b"new", below=tmp_path / "run")
    assert not list(outside.iterdir())


def test_the_users_own_folder_may_be_a_link(tmp_path: pathlib.Path) -> None:
    """The folder that the user named is followed."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    whole_files.write(tmp_path / "runs" / "a" / "file", b"new", below=tmp_path / "runs")
    assert (tmp_path / "disk" / "a" / "file").read_bytes() == b"new"


def test_a_failed_write_leaves_the_old_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(LoraError, match="cannot be written"):
        whole_files.write(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_write_left_is_deleted(tmp_path: pathlib.Path) -> None:
    """The next write of the same file deletes it, but not what another process is writing."""
    names = [f".writing-{name}-0123abcd" for name in ("file", "file", "other")]
    names[1] += "e"
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    with (tmp_path / names[1]).open() as held:
        assert whole_files._lock(held.fileno())
        whole_files.write(tmp_path / "file", b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[1:], "file"])


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "folder"])
def test_append_opens_only_a_file_of_its_own(kind: str, tmp_path: pathlib.Path) -> None:
    """A file with two names is somebody else's, too."""
    mine, path = tmp_path / "mine", tmp_path / "metrics.jsonl"
    mine.write_text("mine")
    if kind == "link":
        path.symlink_to(mine)
    elif kind == "hard link":
        path.hardlink_to(mine)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises((LoraError, OSError)):
        whole_files.append(path)
    assert mine.read_text() == "mine"


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power may fail: the bytes are synced before the rename, and the folder after it."""
    calls: list[str] = []
    for name in ("fsync", "replace"):
        plain = getattr(os, name)
        told = lambda *a, name=name, plain=plain, **b: (calls.append(name), plain(*a, **b))  # noqa: E731
        monkeypatch.setattr(os, name, told)
    whole_files.write(tmp_path / "file", b"new")
    assert calls == ["fsync", "replace", "fsync"]
    calls.clear()
    whole_files.write_together(tmp_path / "folder", {"a": lambda path: path.write_text("a")})
    assert calls[0] == "fsync" and "replace" in calls[1:]


def test_the_umask_counts(tmp_path: pathlib.Path) -> None:
    old = os.umask(0o027)
    try:
        whole_files.write(tmp_path / "file", b"new")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
