"""A command stopped by a full disk says so, and goes on when there is room.

Two stand-ins need no right to mount: a hook refuses a file or folder that Python makes, and a limit
for the size of files stops writes of every library. POINTS is the number of full disks for each
command.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lora_jax.__main__ import main
from measuring.golden_runs import GOLDEN, write_run
from tests.faults.commands import assert_same_adapter, assert_same_files
from tests.training.hooks import FullDisk

pytestmark = pytest.mark.standard_promotion
POINTS = int(os.environ.get("POINTS", "2"))
COMMANDS = ("hf", "peft", "gguf", "mlx", "orbax", "import")


@pytest.fixture(scope="module")
def hook() -> FullDisk:
    made = FullDisk()
    sys.addaudithook(made)
    return made


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, pathlib.Path], list[str]]:
    """Return the command line of a command that writes to a folder."""
    folder = tmp_path_factory.mktemp("run")
    run, peft = folder / "run", folder / "peft"
    write_run(run, "llama")
    assert main(["export", str(run), "--format", "peft", "--out", str(peft)]) == 0

    def line(name: str, out: pathlib.Path) -> list[str]:
        if name == "import":
            return ["import", str(peft), "--base", str(GOLDEN / "llama"), "--out", str(out)]
        words = ["report", str(run)] if name == "report" else ["export", str(run), "--format", name]
        return [*words, "--out", str(out)]

    return line


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.few(2)
@pytest.mark.parametrize("name", [*COMMANDS, pytest.param("report", marks=pytest.mark.slow)])
def test_a_full_disk_and_then_room(
    name: str, lines: Any, hook: FullDisk, tmp_path: pathlib.Path, capfd: Any
) -> None:
    """The same command ends with the same bytes once there is room, wherever the disk was full."""
    same = assert_same_adapter if name == "import" else assert_same_files
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    whole = first / "whole"
    with hook.full(first, sys.maxsize):
        assert main(lines(name, whole)) == 0
    largest = max(p.stat().st_size for p in whole.rglob("*") if p.is_file())
    draw, room = random.Random(name), sys.maxsize
    for number in range(POINTS):
        place, size = second / str(number), draw.randrange(largest // 2, largest)
        # If Orbax cannot make a folder, its other threads wait for it until the tests end.
        if number > 0 and name != "import":
            room, size = draw.randrange(hook.made), resource.RLIM_INFINITY
        capfd.readouterr()
        with hook.full(second, room), small_files(size):
            assert main(lines(name, place)) == 1, (room, size)
        said = " ".join(capfd.readouterr().err.split())
        assert "error: " in said and "start the same command again" in said, said
        assert ("Make room" if size < 0 else "Allow larger files") in said, said
        assert main(lines(name, place)) == 0, capfd.readouterr().err
        same(whole, place)
