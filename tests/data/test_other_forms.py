"""Files as other people publish them are read, rendered and counted without a change by hand."""

from __future__ import annotations

import io
import os
import pathlib
import re

import pytest
from rich.console import Console

from lora_jax.cli.show import ShowOptions, run
from lora_jax.data import DataError
from lora_jax.models.text.conversation import conversation
from tests.training import tiny

HERE = pathlib.Path(__file__).with_name("other_forms")
# File -> its form, its texts, and a text that is learned.
FILES = {
    "alpaca_demo.json": ("instruction", 3, "der Leuchtturm"),
    "dpo_demo.json": ("preference", 4, "The Baltic."),
    "kto_demo.json": ("judged_messages", 2, "-2"),
    "toolcall_demo.json": ("conversations", 2, '"arguments": {"port": "Emden"}'),
    "v1_sft_demo.jsonl": ("messages", 1, "It is 10."),
    "v1_dpo_demo.jsonl": ("preference_messages", 2, "The Baltic."),
    "chitchat.json": ("messages", 1, "I like rain\nand snow"),
}
# The real files: rows. The training split is what eval_share leaves of them.
REAL = {
    "alpaca_en_demo.json": 999,
    "dpo_en_demo.json": 300,
    "kto_en_demo.json": 300,
    "glaive_toolcall_en_demo.json": 300,
    "v1_sft_demo.jsonl": 500,
    "dataset.json": 7_168,
}
OTHER = os.environ.get("LORA_JAX_OTHER_DATA")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder whose template knows tools."""
    folder = tmp_path_factory.mktemp("other")
    found = tiny.write_chat(folder, 1)["base"]
    text = (tiny.CHAT / "qwen25.jinja").read_text()
    (folder / "base" / "chat_template.jinja").write_text(text)
    return found


def shown(base: str, source: str) -> str:
    file = io.StringIO()
    console = Console(file=file, width=100, color_system=None)
    run(ShowOptions(base, data=source, count=9), console, console)
    return file.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_a_form_of_another_tool_is_shown(base: str, name: str) -> None:
    form, texts, learned = FILES[name]
    text = shown(base, f"train={HERE / name},validation={HERE / name}")
    assert f"examples of the form {form!r}" in text
    assert len(re.findall(r"-- example \d+: [1-9]\d* tokens, [1-9]\d* learned", text)) == texts
    assert any(learned in part for part in re.findall(r"\[\[(.+?)\]\]", text, re.DOTALL))
    lengths = re.findall(r"^ *\d+ to \d+ +(\d+)", text, re.MULTILINE)
    assert sum(map(int, lengths)) == texts


@pytest.mark.skipif(OTHER is None, reason="LORA_JAX_OTHER_DATA names no folder")
@pytest.mark.parametrize("name", REAL)
def test_the_real_files_are_shown(base: str, name: str) -> None:
    path = pathlib.Path(OTHER or "") / name
    text = shown(base, f"train={path},validation={path}")
    assert f": {REAL[name]:,} examples of the form" in text


def test_a_chat_has_two_senders() -> None:
    turns = [[{"sender": who, "text": "a"}] for who in ("x", "y", "z")]
    with pytest.raises(DataError, match=r"here, turn 3: .*a third sender"):
        conversation(turns, "here")
    with pytest.raises(DataError, match=r"here, turn 1: .*a sender, got"):
        conversation([[{"text": "a"}]], "here")
