"""Files of a run that are cut short or edited by hand: the error names the file and the cure."""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib

import pytest

import lora_jax
from configs.own_model import config as CONFIG
from lora_jax.groups.group_checkpoints import GroupCheckpoints
from lora_jax.training import directory, metrics

BROKEN = [
    (b'{"steps": 3', "is not JSON"),
    (b"", "is not JSON"),
    (b"\xff", "is not UTF-8"),
    (b"[]", "holds a list, expected an object"),
    (b"[" * 100_000, "is nested too deeply|is not JSON"),
]


@pytest.mark.parametrize(("content", "says"), [*BROKEN, (b"{}", "is not a config of train.py")])
def test_a_broken_config_of_a_run(content: bytes, says: str, tmp_path: pathlib.Path) -> None:
    """A broken config is an error that names its file. Red if `_claim` reads with `json.loads`
    alone: its traceback names no file."""
    (tmp_path / "config.json").write_bytes(content)
    config = dataclasses.replace(CONFIG, run_dir=str(tmp_path))
    says = rf"config\.json ({says}).*--fresh"
    with pytest.raises(lora_jax.LoraError, match=says), directory.enter("own_model", config):
        pass


@pytest.mark.parametrize(("content", "says"), [*BROKEN, (b"{}", "has no 'steps'")])
def test_a_broken_summary_of_a_run(content: bytes, says: str, tmp_path: pathlib.Path) -> None:
    """A broken summary is an error that names its file. Red if `directory.summary` returns any
    JSON: to print its table is a KeyError."""
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
    (tmp_path / "cuts.json").write_bytes(content)
    with pytest.raises(lora_jax.LoraError, match=r"cuts\.json is no"):
        GroupCheckpoints(tmp_path)


def test_a_file_that_cannot_be_written_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed write names the file, and the earlier content stays. Red: the error of a full disk
    names no file."""

    def full(self: pathlib.Path, content: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "summary.json"
    directory.write_json(file, {"a": 1})
    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(lora_jax.LoraError, match=r"summary\.json cannot be written: No space left"):
        directory.write_json(file, {"a": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert file.read_text() == '{\n  "a": 1\n}\n'
