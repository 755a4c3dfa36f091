"""Everything in the README runs: its code, its commands, its links."""

import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from tests.training import forks

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Return all commands of the shell blocks as words; `a && b` are two, comments are left out."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    parts = [part for line in lines for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def python_commands() -> list[list[str]]:
    """The words after `python`, for the commands that run code of this repository."""
    runs = [words[1:] for words in commands() if pathlib.Path(words[0]).name == "python"]
    return [words for words in runs if words[:2] != ["-m", "pytest"]]


def test_python_blocks_run_in_order(tmp_path: pathlib.Path) -> None:
    assert blocks("python")
    (tmp_path / "readme.py").write_text("\n".join(blocks("python")))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "readme.py"], check=True, cwd=tmp_path, env=env)


@pytest.mark.parametrize("words", python_commands(), ids=" ".join)
def test_commands_take_their_options(words: list[str], tmp_path: pathlib.Path) -> None:
    """Each command accepts its options: `--help-all` at the end checks all options before it."""
    log = tmp_path / "log"
    status = forks.python([*words, "--help-all" if words[0] == "train.py" else "--help"], log)
    text = log.read_text()
    assert status == 0, text
    options = {word for word in words if word.startswith("--")}
    for option in options:
        assert option in text, f"{option} is not among the options of {words}"


def test_it_is_short() -> None:
    assert TEXT.count("\n") <= 150


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {e for extras in re.findall(r"\.\[([\w,]+)\]", TEXT) for e in extras.split(",")}
    assert named
    assert named <= set(project["optional-dependencies"])


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", TEXT)
    named = re.findall(r"(?<![\w/.])(?:configs|benchmarks|tests|lora_jax)/[\w/]+\.py", TEXT)
    assert links
    for name in [*links, *named]:
        assert (ROOT / name).exists(), name


def test_named_api_exists() -> None:
    names = set(re.findall(r"`(lora_jax(?:\.\w+)+)", TEXT))
    assert names
    for name in names:
        parts = name.split(".")
        cut = next(
            i for i in range(len(parts), 0, -1) if importlib.util.find_spec(".".join(parts[:i]))
        )
        value = importlib.import_module(".".join(parts[:cut]))
        for part in parts[cut:]:
            value = getattr(value, part)
