"""Files of a run that are cut short or edited by hand: the error names the file and the cure."""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib
import types
from typing import Any

import pytest

import lora_jax
from configs.own_model import config as CONFIG
from lora_jax.sweeps.group_checkpoints import GroupCheckpoint, GroupCheckpoints
from lora_jax.system import whole_files
from lora_jax.training import directory, metrics
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.open_run import Run, Setup

BROKEN = [
    (b'{"steps": 3', "is not JSON"),
    (b"", "is not JSON"),
    (b"\xff", "is not UTF-8"),
    (b"[]", "holds a list, expected an object"),
    (b"[" * 100_000, "is nested too deeply|is not JSON"),
]


@pytest.mark.parametrize(("content", "says"), [*BROKEN, (b"{}", "is not a config of train.py")])
def test_a_broken_config_of_a_run(content: bytes, says: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path))
    says = rf"config\.json ({says}).*--fresh"
    with pytest.raises(lora_jax.LoraError, match=says), directory.enter("own_model", config):
        pass


@pytest.mark.parametrize(("content", "says"), [*BROKEN, (b"{}", "has no 'steps'")])
def test_a_broken_summary_of_a_run(content: bytes, says: str, tmp_path: pathlib.Path) -> None:
    assert directory.summary(tmp_path) is None
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(lora_jax.LoraError, match=rf"summary\.json ({says}).*; delete it and start"):
        directory.summary(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"step": 1', r":2 is not JSON.*delete the damaged line"),
        (b"\xff", ":2 is not UTF-8"),
        (b"3", ":2 is not a line"),
        (b'{"loss": 1}', ":2 is not a line"),
    ],
)
def test_a_broken_line_of_a_record(line: bytes, says: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"st')
    with pytest.raises(lora_jax.LoraError, match=f"metrics.jsonl{says}"):
        metrics.read(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"3", b"[3]", b'[{"x": 1}]'])
def test_a_broken_list_of_checkpoints(content: bytes, tmp_path: pathlib.Path) -> None:
    (tmp_path / "checkpoints.json").write_bytes(content)
    with pytest.raises(lora_jax.LoraError, match=r"checkpoints\.json is no"):
        GroupCheckpoints(tmp_path)


def test_a_file_that_cannot_be_written_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "summary.json"
    whole_files.write_json(file, {"a": 1})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(lora_jax.LoraError, match=r"summary\.json cannot be written: No space left"):
        whole_files.write_json(file, {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert file.read_text() == '{\n  "a": 1\n}\n'


def test_the_record_is_on_disk_before_the_summary(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every line is in metrics.jsonl when a run is marked as finished, while it is still open."""
    seen: list[metrics.Line] = []
    monkeypatch.setattr(directory, "finish", lambda path, _: seen.extend(metrics.read(path)))
    workload: Any = types.SimpleNamespace(evaluation={"test": None})
    none: Any = None
    setup = Setup(CONFIG, workload, none, none, none, none, tmp_path, began=0.0)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        run = Run(setup, none, checkpoints)
        run.open(none)
        run.evaluate_before(none, {"test": {"loss": 0.5}})
        run.finish({})
        run.close()
    assert seen == [{"step": 0, "split": "test", "loss": 0.5}]


def test_a_killed_fresh_start_leaves_no_finished_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--fresh` deletes the summary first and the config last, so a kill in between is seen."""
    names = ["summary.json", "metrics.jsonl", "error.txt", "curves.png", "config.json"]
    for name in names:
        (tmp_path / name).touch()
    gone: list[str] = []
    monkeypatch.setattr(pathlib.Path, "unlink", lambda path: gone.append(path.name))
    directory._clear(tmp_path)
    assert (gone[0], gone[-1]) == ("summary.json", "config.json") and len(gone) == len(names)


def test_a_group_killed_twice_before_its_next_checkpoint(tmp_path: pathlib.Path) -> None:
    steps = {"a": [20], "b": [20]}
    for start in range(4):
        checkpoints = GroupCheckpoints(tmp_path)
        if start:
            found = checkpoints.newest(steps)
            assert found is not None and found.steps == {"a": 20, "b": 20}, start
        for step in (20, 30) if start == 0 else (30,):
            checkpoints.add(GroupCheckpoint({"a": step, "b": step}, ["a", "b"]))
