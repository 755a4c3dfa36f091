"""Chat templates: as transformers renders them, and bounded if a stranger wrote them."""

import functools
import json
import pathlib
import time
from typing import Any

import pytest

from lora_jax.errors import DataError
from lora_jax.models.text import chat_template
from lora_jax.models.text.chat_template import ChatTemplate, end_of_turn
from lora_jax.models.text.conversation import conversation

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "golden_chat"
GOLDEN: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@functools.cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate((FOLDER / f"{name}.jinja").read_text(), SPECIAL, name)


@pytest.mark.parametrize("name", list(GOLDEN["expected"]))
def test_rendered_as_transformers_renders(name: str) -> None:
    made = template(name)
    for key, expected in GOLDEN["expected"][name].items():
        tools = [GOLDEN["tool"]] if key == "tools" else None
        found = conversation(GOLDEN["conversations"][key], key, tools)
        if "error" in expected:
            with pytest.raises(DataError, match=r"roles|Roles|role"):
                made.prompt(found.messages, found.tools)
            continue
        assert made.prompt(found.messages, found.tools) == expected["prompt"]
        assert made.example(found.messages, found.tools, []).text == expected["text"]


def test_the_template_for_tools_is_taken_if_there_are_some() -> None:
    other = ChatTemplate("{{ tools[0].function.name }}", {}, "tools")
    made = ChatTemplate("plain", {}, "plain", other)
    assert made.prompt([], None) == "plain"
    assert made.prompt([], [GOLDEN["tool"]]) == "weather"


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("mistral", "</s>")]
    + [("gemma", "<end_of_turn>"), ("phi3", "<|end|>"), ("chatml_marked", "<|im_end|>")],
)
def test_the_end_of_a_turn(name: str, end: str) -> None:
    tokens = ["<s>", "</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|user|>"]
    assert end_of_turn(template(name), tokens) == end


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a' * 10**9 }}", "too large"),
        ("{{ [1] * messages[0].content * 10**8 }}", "too large"),
        ("{{ 9**99999 }}", "too large"),
        ("{{ ('x' | center(messages[0].content)) | length }}", "memory"),
        ("{% for i in range(9**9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        (
            "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
            "more than 4,194,304 characters",
        ),
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{% set n = namespace(_x=1) %}", "_x"),
    ],
)
def test_a_hostile_template_is_refused(text: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)a.jsonl:3: .*theirs.*{said}"):
        ChatTemplate(text, {}, "theirs").prompt([{"content": 10**9}], None, "a.jsonl:3")


def test_a_template_that_is_none() -> None:
    with pytest.raises(DataError, match="theirs is not a template: line 2"):
        ChatTemplate("a\n{% if", {}, "theirs").prompt([])


def test_an_endless_template_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(chat_template, "SECONDS", 3.0)
    made = ChatTemplate("{% if messages %}" + loop + "{% endif %}ok", {}, "theirs")
    assert made.prompt([]) == "ok"
    started = time.monotonic()
    with pytest.raises(DataError, match=r"a.jsonl:3: theirs fails: .* not come to an end"):
        made.prompt([{"content": "a"}], None, "a.jsonl:3")
    assert time.monotonic() - started < 10
    assert made.prompt([]) == "ok"  # a new process
