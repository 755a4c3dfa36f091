"""An export killed before any of its changes leaves a whole folder, or the folder as it was."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from lora_jax import LoraError
from lora_jax.system.whole_files import whole_folder, write_together

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = ("model.safetensors", "config.json")


def write(folder: pathlib.Path) -> None:
    write_together(folder, {name: lambda path: path.write_text(path.name) for name in FILES})


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Forks are cheap in a process without threads.
KILLED = """
import os, pathlib, sys
from tests.faults.test_exports import write
from tests.training.hooks import Changes

place, change = pathlib.Path(sys.argv[1]), 0
while True:
    change += 1
    run = place / str(change)
    run.mkdir()
    if change % 2:
        (run / "out").mkdir()
    child = os.fork()
    if not child:
        sys.addaudithook(Changes(run, change, run / "count"))
        write(run / "out")
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def test_whenever_it_is_killed(tmp_path: pathlib.Path) -> None:
    """A killed write leaves no folder, an empty one or a whole one; the next completes it."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    seen = set[int]()
    for run in tmp_path.iterdir():
        out = run / "out"
        found = names(out) if out.exists() else []
        assert found in ([], sorted(FILES)), f"an incomplete folder, killed at change {run.name}"
        seen.add(len(found))
        if not found:
            write(out)
        assert names(out) == sorted(FILES)
        assert names(run) == ["out"], "unfinished files were not deleted"
    assert len(names(tmp_path)) > len(FILES) + 2 and seen == {0, len(FILES)}


def test_files_that_are_there_stay(tmp_path: pathlib.Path) -> None:
    """Other files in the folder stay: several adapters of llama.cpp may share one folder."""
    (tmp_path / "other").touch()
    write(tmp_path)
    assert names(tmp_path) == sorted([*FILES, "other"])


def test_two_at_once(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"

    def late() -> None:
        with whole_folder(out) as aside:
            write(out)
            (aside / "mine").touch()

    with pytest.raises(LoraError, match="out was written by another process"):
        late()
    assert names(out) == sorted(FILES)
    assert names(tmp_path) == ["out"]


def test_an_error_leaves_nothing(tmp_path: pathlib.Path) -> None:
    def fail(path: pathlib.Path) -> None:
        path.touch()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write_together(tmp_path / "out", {"a": fail})
    assert not names(tmp_path)


def test_a_link_to_a_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    write(tmp_path / "out")
    assert names(tmp_path / "real") == sorted(FILES)
