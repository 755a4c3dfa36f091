"""The chat templates and the special tokens of a Hugging Face folder."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.errors import DataError, TokenizerError, shown
from lora_jax.models.text.chat_template import ChatTemplate
from lora_jax.models.weights.assemble import Source
from lora_jax.system import json_file, regular_files

_SETTINGS = "tokenizer_config.json"
_MORE = "additional_chat_templates"


def open_template(source: Source, file: str | None = None, day: str | None = None) -> ChatTemplate:
    """Return the chat template of a model, or of a file with Jinja text, on a day (None: today).

    Raises:
      TokenizerError: the file cannot be read.
      DataError: the model has no template.
    """
    if file is not None:
        return ChatTemplate(read_text(file), source.special_tokens, file, day=day)
    return template_of(source.chat_templates, source.special_tokens, str(source.path), day)


def template_of(
    found: Mapping[str, str], variables: Mapping[str, str], where: str, day: str | None = None
) -> ChatTemplate:
    """Return the chat template, from templates by name: `default`, and `tool_use` for tools."""
    if "default" not in found:
        raise DataError(
            f"{where} has no chat template, and a conversation needs one: the model was not "
            "trained on conversations. Take its instruct version, or name a file with the Jinja "
            "text of a template (data.template)."
        )
    make = functools.partial(ChatTemplate, variables=variables, day=day)
    tools = found.get("tool_use")
    used = None if tools is None else make(tools, where=f"tool_use of {where}")
    return make(found["default"], where=f"the chat template of {where}", tools=used)


def templates(folder: Path) -> Mapping[str, str]:
    """Return the templates by name; a file of their own comes before tokenizer_config.json.

    `TokenizerError`: a file cannot be read, or does not hold a template.
    """
    found = _stored(folder / _SETTINGS)
    alone = folder / "chat_template.jinja"
    if os.path.lexists(alone):
        found["default"] = read_text(alone)
    if (folder / _MORE).is_dir():
        found |= {path.stem: read_text(path) for path in sorted((folder / _MORE).glob("*.jinja"))}
    return found


def special_tokens(folder: Path) -> Mapping[str, str]:
    """Return the special tokens by name (`bos_token`, `eos_token`, ...)."""
    settings = _settings(folder / _SETTINGS)
    tokens = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in tokens.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _stored(path: Path) -> dict[str, str]:
    found = _settings(path).get("chat_template")
    if found is None:
        return {}
    entries = found if isinstance(found, list) else [{"name": "default", "template": found}]
    try:
        named = {entry["name"]: entry["template"] for entry in entries}
    except (TypeError, KeyError):
        named = {"": found}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise TokenizerError(
            f"{path}: chat_template is {shown(found)}, expected a text, or a list of objects with "
            "name and template"
        )
    return named


def _settings(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    return json_file.read(path, TokenizerError, cure="fetch the file again, from someone you trust")


def read_text(path: str | Path) -> str:
    """Return the text of a template's file."""
    path = Path(path).expanduser()
    try:
        return regular_files.read(path, TokenizerError).decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 ({error.reason})") from None
