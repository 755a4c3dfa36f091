"""The promises of a release: its public names, its version, and the packages that it fetches."""

from __future__ import annotations

import pathlib
import re

import lora_jax
from docs import public

ROOT = pathlib.Path(__file__).parents[2]


def test_a_change_of_the_public_names_is_in_the_changelog() -> None:
    """The record has the same names and parameters, or the changelog names each change."""
    before, now = {*public.RECORD.read_text().splitlines()}, {*public.signatures()}
    unreleased = (ROOT / "CHANGELOG.md").read_text().partition("## [Unreleased]")[2]
    unreleased = unreleased.partition("\n## [")[0]
    changed = sorted((before ^ now) - {""})
    names = {line: line.partition("(")[0].rpartition(".")[2] for line in changed}
    silent = [line for line, name in names.items() if not re.search(rf"\b{name}\b", unreleased)]
    assert not silent, (
        "the public names changed:\n"
        + "\n".join(f"  {'+' if line in now else '-'} {line}" for line in silent)
        + "\nWrite them into CHANGELOG.md under [Unreleased]; before a release, python -m "
        "docs.public writes the record anew"
    )


def test_one_version() -> None:
    version = lora_jax.__version__
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert public.RECORD.exists()


def test_what_is_fetched_has_a_licence_in_the_list() -> None:
    """Every package that the code takes files from is a row of the table."""
    page = (ROOT / "docs" / "stability.md").read_text()
    pins = set[str]()
    for path in (ROOT / "lora_jax").rglob("*.py"):
        text = path.read_text()
        pins |= set(re.findall(r"\bpypi:([a-z0-9-]+==[\d.]+)/", text)) - {"package==1.0"}
        pins |= {"==".join(pair) for pair in re.findall(r'locate\("([^"]+)", "([^"]+)"', text)}
    assert len(pins) == 5
    assert not [pin for pin in pins if f"| `{pin}` |" not in page]
