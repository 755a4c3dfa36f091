"""The install lines of the pages: their extras exist, and bring what the page then runs."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib

from tests.docs.pages import DOCS, ROOT, names

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(DOCS / f"{name}.md" for name in names())]
# In a sentence, a line of code or a command of another machine: up to the end of the command.
_INSTALL = re.compile(r"\bpip install((?:[ \t]+(?:\"[^\"`\n]*\"|'[^'`\n]*'|[^\s`&|#;]+))+)")
_REQUIREMENT = re.compile(r"^(?P<name>\.|\w[\w.-]*?)(?:\[(?P<extras>[\w,-]+)\])?(?:[=<>!~].*)?$")
_RUNS = re.compile(r"^[^#\n]*(?:train\.py|\blora-jax (?!--help))", re.M)


def installs(text: str) -> list[tuple[str, set[str]]]:
    """Return each requirement of each install line, with its extras; `.` is this project."""
    found = []
    for line in _INSTALL.findall(text):
        words = [word.strip("'\"") for word in line.split()]
        for match in filter(None, map(_REQUIREMENT.match, words)):
            name = "." if match["name"].startswith("lora-jax") else match["name"]
            found.append((name, set(filter(None, (match["extras"] or "").split(",")))))
    return found


def brought(extras: set[str]) -> set[str]:
    """Return the extras of this project, with all that they contain."""
    inner = {x for e in extras for r in EXTRAS[e] for n, some in installs(f"pip install {r}")
             if n == "." for x in some}  # fmt: skip
    return extras | (brought(inner) if inner else set())


def test_the_extras_of_an_install_line_exist() -> None:
    for path in FILES:
        for name, extras in installs(path.read_text()):
            known = EXTRAS if name == "." else extras and provided(name)
            assert extras <= set(known), f"{path}: {name}[{','.join(extras)}]"


def provided(name: str) -> list[str]:
    return importlib.metadata.metadata(name).get_all("Provides-Extra") or []


def test_a_page_installs_what_its_commands_need() -> None:
    """Every command needs the extra `train`, so a page that installs and runs one must name it."""
    seen = 0
    for path in FILES:
        blocks = re.findall(r"^```(?:sh|console|bash)\n(.*?)^```", path.read_text(), re.M | re.S)
        ours = [extras for block in blocks for name, extras in installs(block) if name == "."]
        if ours and any(_RUNS.search(block) for block in blocks):
            assert any("train" in brought(extras) for extras in ours), path
            seen += 1
    assert seen >= 5


def test_an_install_line_is_read_in_every_form() -> None:
    text = """.venv/bin/pip install -e ".[train,plan-tpu]" "jax[tpu]"' # x
    run `pip install 'lora-jax[hub]'` or pip install lora_jax-1-py3-none-any.whl && x"""
    assert installs(text) == [
        (".", {"train", "plan-tpu"}),
        ("jax", {"tpu"}),
        (".", {"hub"}),
        ("lora_jax-1-py3-none-any.whl", set()),
    ]
    assert brought({"test"}) >= {"train", "gguf"}
