"""Every block of the pages runs, and every command has the options that it is given."""

from __future__ import annotations

import ast
import functools
import importlib.util
import pathlib
import pkgutil
import re

import jax
import pytest

from docs import public
from tests.docs import pages
from tests.training import forks

# Packages of other people that not every environment has; a block that needs one is skipped.
OTHERS = {"equinox", "eqx_zoo", "keras", "penzai", "tunix"}
ELSEWHERE = {
    "own_model": "tests/foreign/test_own_model.py runs each section and checks its files",
    "extending": "tests/test_extending.py runs it and checks the laws",
    "projects": "tests/foreign/test_projects.py runs each section and checks the laws",
}
RUN = [n for n in pages.names() if n.split("/")[0] not in ELSEWHERE and pages.sections(n)]

pytestmark = pytest.mark.standard_promotion


def imported(code: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(code)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_a_page_runs(name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(b.code for b in pages.blocks(name) if b.language == "python")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    for package in imported(code) & OTHERS:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with jax.numpy_rank_promotion("allow"):  # JAX's default; Keras adds biases by promotion
        assert pages.run(name)  # the names that the page defines


@pytest.mark.parametrize("name", pages.names())
def test_python_that_is_only_shown_is_python(name: str) -> None:
    for block in pages.blocks(name):
        if block.language.startswith("{code-block} python"):
            assert ast.parse(re.sub(r"^:.*\n", "", block.code, flags=re.M)).body


# Commands of other people that pages may call.
FOREIGN = {"pip", "git", "cd", "source", "export", "apt-get", "gcloud", "srun", "mpirun", "time"}
FOREIGN |= {"status=$?", "exit", "if", "vllm", "llama-cli", "llama-server", "ollama", "curl"}
FOREIGN |= {"mlx_lm.generate", "cat", "ls", "mkdir"}
PYTHON = {"python", "python3"}
OURS = {"benchmarks", "docs", "experiments", "lora_jax", "measuring", "tests"}


def ours(words: list[str]) -> tuple[str, ...] | None:
    """The program that a command starts, as its words before options; None if it is not ours."""
    first = pathlib.Path(words[0]).name
    if first == "lora-jax":
        return ("-m", "lora_jax", *words[1:2])
    if first not in PYTHON:
        assert "=" in first or first in FOREIGN, words
        return None
    if words[1] == "train.py":
        config = words[words.index("--config") + 1] if "--config" in words else None
        there = config is not None and (pages.ROOT / config.partition(":")[0]).exists()
        return ("train.py", "--config", config) if config and there else ("train.py",)
    assert words[1] in ("-m", "-c") or words[1].startswith(("docs/", "-")), words
    ours = words[1] == "-m" and words[2].split(".")[0] in OURS
    return tuple(words[1:3]) if ours else None


@functools.cache
def help_of(program: tuple[str, ...], folder: pathlib.Path) -> str:
    log = folder / f"{len(list(folder.iterdir()))}.log"
    every = "--help-all" if {"train.py", "lora_jax"} & {*program} else "--help"
    assert forks.python([*program, every], log) == 0, log.read_text()
    return log.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("help")


@pytest.mark.parametrize("name", [name for name in pages.names() if pages.commands(name)])
def test_commands_take_their_options(name: str, folder: pathlib.Path) -> None:
    for words in pages.commands(name):
        program = ours([w for w in words if not re.fullmatch(r"[A-Z_]+=\S*", w)])
        if program is None:
            continue
        if program[-1].startswith(("tests.", "docs.")):  # these have no --help
            assert importlib.util.find_spec(program[-1]) is not None, words
            continue
        text = help_of(program, folder)
        for option in {w.partition("=")[0] for w in words if w.startswith("--")} - {"--help"}:
            assert re.search(rf"{option}\b", text), f"{option} is not an option of {words}"


def test_every_public_name_is_in_a_table_of_the_reference() -> None:
    """Each public name is in a table of the reference; the build of the site checks values too."""
    listed = set()
    for name in pages.names():
        if name.startswith("api/"):
            for block in pages.blocks(name):
                module = re.search(r"currentmodule:: (\S+)", block.code)
                rows = re.findall(r"^   (\w+)$", block.code, re.M)
                listed |= {f"{module[1]}.{row}" for row in rows if module}
    known = public.names()
    assert not listed - set(known)
    described = [known[name] for name in listed]
    missing = [n for n, v in known.items() if not any(v is x for x in described)]
    assert not missing


def test_named_modules_and_files_exist() -> None:
    for name in pages.names():
        text = (pages.DOCS / f"{name}.md").read_text()
        for path in re.findall(
            r"(?<![\w/.])(?:configs|benchmarks|tests|lora_jax)/[\w/]+\.py", text
        ):
            assert (pages.ROOT / path).exists(), f"docs/{name}.md: {path}"
        for dotted in set(re.findall(r"`(lora_jax(?:\.\w+)+)", text)):
            assert exists(dotted), f"docs/{name}.md: {dotted}"


def exists(dotted: str) -> bool:
    """Return whether a dotted name is a module, or an attribute of one."""
    try:
        pkgutil.resolve_name(dotted)
    except (ImportError, AttributeError):
        return False
    return True


def test_the_messages_of_the_troubleshooting_page_are_said() -> None:
    texts = [words for path in (pages.ROOT / "lora_jax").rglob("*.py") for words in said(path)]
    page = (pages.DOCS / "troubleshooting.md").read_text()
    messages = re.findall(r"^### `(.*)`$", page, re.M)
    assert len(messages) > 20
    for message in messages:
        parts = [part.strip() for part in message.split("...") if part.strip()]
        assert any(all(part in text for part in parts) for text in texts), message


def said(path: pathlib.Path) -> list[str]:
    """The texts of a file; a text with values in it is given without them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value for p in node.values if isinstance(p, ast.Constant)]
            found.append(" ".join(" ".join(map(str, parts)).split()))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(" ".join(node.value.split()))
    return found
