"""The messages of commands: one error, without control characters."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import train
from lora_jax.errors import LoraError
from lora_jax.serving import jsonl
from lora_jax.system import console
from lora_jax.training import one_run
from tests.training.runs import OWN


def test_names_of_strangers_do_not_command_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "a\x1b]52;c;eA==\x07b\x9b2J\r\x08"
    file = io.StringIO()
    console.say(Console(file=file, force_terminal=True), f"{name}c\nd")
    assert file.getvalue() == r"a\x1b]52;c;eA==\x07b\x9b2J\r\x08c" + "\nd\n"

    def refuse() -> None:
        raise LoraError(name)

    assert console.guarded(refuse) == 1
    assert not set("\x1b\x07\x9b\r\x08") & set(capsys.readouterr().err)


def test_lines_of_json_hold_no_control_characters(tmp_path: pathlib.Path) -> None:
    value = {"text": "a\x1b[2J\x9b2J\x7fé\N{GRINNING FACE}"}
    with jsonl.Writer(str(tmp_path / "out.jsonl")) as writer:
        writer.write([value])
    text = (tmp_path / "out.jsonl").read_text()
    assert not set("\x1b\x9b\x7f") & set(text) and "é\N{GRINNING FACE}" in text
    assert json.loads(text) == value


@dataclasses.dataclass(frozen=True)
class Said:
    """The options of a test's command."""

    image: tuple[str, ...] = ()
    out: str = "-"


def test_options_of_one_value_that_are_repeated_are_noted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--image", "a", "--image=b", "--out", "x", "--out", "y"]
    found = console.read_options(Said, "test", None, given, adding=True)
    assert found == Said(("a", "b"), "y")
    assert capsys.readouterr().err == "note: --out is given 2 times; the last one counts\n"
    found = console.read_options(Said, "test", None, ["--image", "a", "b", "--image", "c"])
    assert found.image == ("c",)
    assert "--image is given 2 times" in capsys.readouterr().err


def test_a_lack_of_memory_is_an_error_with_a_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def large(*_: object) -> None:
        jax.block_until_ready(jax.jit(lambda: jnp.zeros(2**46, jnp.uint8))())

    assert console.guarded(large) == 1
    said = capsys.readouterr().err
    assert "error: there is not enough memory: RESOURCE_EXHAUSTED" in said
    assert "--batch-size" in said and "Traceback" not in said
    monkeypatch.setattr(one_run, "train", large)
    assert train.main(["--config", OWN, "--run-dir", str(tmp_path)]) == 1
    assert "--accumulate" in capsys.readouterr().err

    def broken() -> None:
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        console.guarded(broken)
    assert console.out_of_memory(MemoryError(), "less") == (
        "there is not enough memory: MemoryError\nless"
    )
