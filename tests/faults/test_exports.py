"""A folder of an export that is killed before each of its changes is whole, or as it was before."""

from __future__ import annotations

import pathlib
import shutil
import sys

import pytest

from lora_jax import LoraError
from lora_jax.exchange.files import whole_folder, write_together
from tests.training.forks import _FORKS, Changes

FILES = ("model.safetensors", "config.json")


def write(folder: pathlib.Path) -> None:
    write_together(folder, {name: lambda path: path.write_text(path.name) for name in FILES})


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _killed_at(folder: str, change: int) -> None:
    place = pathlib.Path(folder)
    sys.addaudithook(Changes(place, change, place / "count"))
    write(place / "out")


def test_whenever_it_is_killed(tmp_path: pathlib.Path) -> None:
    """Nothing or an empty folder, then all. Red if the files are put into `out` one by one."""
    out, seen = tmp_path / "out", set()
    for change in range(1, 20):
        if change % 2:
            out.mkdir()
        process = _FORKS.Process(target=_killed_at, args=(str(tmp_path), change))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -9)
        found = names(out) if out.exists() else []
        assert found in ([], sorted(FILES)), f"half a folder, killed at change {change}"
        seen.add(len(found))
        if not found:
            write(out)
        assert names(out) == sorted(FILES)
        assert names(tmp_path) == ["out"], "what was left is not deleted"
        shutil.rmtree(out)
        if process.exitcode == 0:
            break
    assert change > len(FILES) + 2 and seen == {0, len(FILES)}


def test_files_that_are_there_stay(tmp_path: pathlib.Path) -> None:
    """As where several adapters of llama.cpp are put into one folder."""
    (tmp_path / "other").touch()
    write(tmp_path)
    assert names(tmp_path) == sorted([*FILES, "other"])


def test_two_at_once(tmp_path: pathlib.Path) -> None:
    """The first to end has it. Red if it deletes what the other one is still writing."""
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
    """Red: the link is not a folder that another one can be renamed to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    write(tmp_path / "out")
    assert names(tmp_path / "real") == sorted(FILES)
