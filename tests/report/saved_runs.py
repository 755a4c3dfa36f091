"""The files of several finished runs, for the price of one training."""

from __future__ import annotations

import dataclasses
import functools
import html.parser
import json
import pathlib
import re
import shutil
from typing import Any

from lora_jax.training.config_json import to_dict
from lora_jax.training.text import TextConfig
from tests.serving import classifiers
from tests.training import tiny

HOSTILE = "<b>&_x_|`$"  # a member's name with HTML, Markdown, and the start of a formula


def trained(folder: pathlib.Path) -> tuple[pathlib.Path, TextConfig]:
    """Train a tiny encoder with stacked layers for two steps, and leave the run as train.py does.

    Return its folder, and the same config with separate parameters for each layer.
    """
    weights = tiny.write_model(folder / "model", tiny.ROBERTA)
    config = classifiers.config_of(weights, classifiers.examples(folder / "data", int))
    scanned = dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=True))
    solo = classifiers.train_in(folder / "solo", scanned)
    (solo / "config.json").write_text(json.dumps(to_dict(scanned)))
    return solo, config


def member(path: pathlib.Path, like: pathlib.Path, config: TextConfig, score: float) -> None:
    """Write a finished run of `config` with the record of `like`, and random factors of its own."""
    classifiers.export_in(path, config)
    record(path, like, to_dict(config), score)


def record(path: pathlib.Path, like: pathlib.Path, config: Any, score: float) -> None:
    """Write such a run without an adapter."""
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(like / "metrics.jsonl", path)
    (path / "config.json").write_text(json.dumps(config))
    summary = json.loads((like / "summary.json").read_text())
    summary["after"]["validation"]["accuracy"] = score
    (path / "summary.json").write_text(json.dumps(summary | {"run": "moved/since"}))


class Page(html.parser.HTMLParser):
    """The contents of a page: tables, facts, tags, and the targets of its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.facts: list[list[str]] = []
        self.paragraphs: list[str] = []
        self.alternatives: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self._into: Any = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        for name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
            self.references += [found[name]] if name in found else []
        self.references += re.findall(r"url\(([^)]*)\)", found.get("style") or "")
        if tag == "svg":
            self.alternatives.append(found["aria-label"])
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self._begin(self.tables[-1][-1])
        elif tag == "dt":
            self.facts.append([])
            self._begin(self.facts[-1])
        elif tag == "dd":
            self._begin(self.facts[-1])
        elif tag in ("p", "h1", "h2", "figcaption"):
            self._begin(self.paragraphs)

    def _begin(self, into: list[str]) -> None:
        into.append("")
        self._into = into

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td", "dt", "dd", "p", "h1", "h2", "figcaption"):
            self._into = None


class Markdown:
    """The contents of a Markdown text: tables, images and facts."""

    def __init__(self, text: str) -> None:
        blocks = [block for block in text.split("\n\n") if block.strip()]
        self.tables = [_cells(block) for block in blocks if block.startswith("|")]
        self.images = re.findall(r"^!\[(.*)\]\((.*)\)$", text, re.MULTILINE)
        found = re.findall(r"^- (.*?): \*\*(.*?)\*\*(?: \((.*)\))?$", text, re.MULTILINE)
        self.facts = [list(map(_read, fact)) for fact in found]


def _cells(block: str) -> list[list[str]]:
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
    return [[_read(cell.strip()) for cell in line] for line in [lines[0], *lines[2:]]]


def _read(text: str) -> str:
    """Return the text that Markdown shows, without bold."""
    plain = re.sub(r"^\*\*(.*)\*\*$", r"\1", text)
    return html.unescape(re.sub(r"\\(.)", r"\1", plain))


@functools.cache
def page(path: pathlib.Path) -> Page:
    return Page(path.read_text())
