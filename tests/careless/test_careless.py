"""Careless input ends in one error with its place and its cure, or is said aloud."""

from __future__ import annotations

import pathlib
import shlex
import unicodedata

import pytest

import train
from lora_jax import __main__ as package
from lora_jax.errors import PackageError
from lora_jax.models.weights import packages
from tests.careless.case import Case
from tests.careless.configs import CONFIGS, NUMBERS
from tests.careless.data import DATA, LINES
from tests.careless.places import EMPTY, NAMES, PLACES
from tests.serving import classifiers
from tests.training import tiny

CASES = [*CONFIGS, *NUMBERS, *EMPTY, *PLACES, *NAMES, *DATA, *LINES]
LETTERS = ("Cc", "Cf", "Cs")  # the categories of Unicode that no screen should get


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("world")
    weights = tiny.write_model(folder / "model", tiny.ROBERTA)
    tiny.write_model(folder / "lm", tiny.LLAMA)
    source = classifiers.examples(folder / "three", int)
    classifiers.export_in(folder / "run", classifiers.config_of(weights, source))
    peft = ["--format", "peft", "--no-head", "--out", str(folder / "peft")]
    assert package.main(["export", str(folder / "run"), *peft]) == 0
    return folder


def prepare(here: pathlib.Path, case: Case) -> None:
    for name, content in case.files.items():
        if isinstance(content, bytes):
            (here / name).write_bytes(content)
        elif content.startswith("-> "):
            (here / name).symlink_to(content[3:])
        else:
            (here / name).write_text(content)


def run(words: list[str]) -> int:
    """Return the exit status of a command, which ends the process after `train`."""
    try:
        return train.main(words[1:]) if words[0] == "train" else package.main(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1


@pytest.mark.few(40)
@pytest.mark.standard_promotion
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_careless_command(
    case: Case,
    world: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:

    def nothing(*_: object) -> None:
        raise PackageError("there is no network")

    here, work = tmp_path / "here", tmp_path / "work"
    here.mkdir()
    work.mkdir()
    prepare(here, case)
    monkeypatch.chdir(work)
    monkeypatch.setattr(packages, "download", nothing)
    words = [word.format(here=here, world=world) for word in shlex.split(case.command)]
    status = run([*words, *case.extra])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    assert not [c for c in shown.out + shown.err if unicodedata.category(c) in LETTERS if c != "\n"]
    assert status == case.status, shown.err
    errors = sum(line.startswith("error:") for line in shown.err.splitlines())
    assert errors == 1 if status == 1 else errors <= (status == 2)
    said = " ".join((shown.out + shown.err).replace("│", " ").split())
    assert [phrase for phrase in case.says if phrase not in said] == [], said
    assert list(work.iterdir()) == []
    for name, phrase in case.out.items():
        assert phrase in (here / name).read_text()
