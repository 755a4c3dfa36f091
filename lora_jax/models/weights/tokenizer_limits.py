"""Limits on what the parts of a tokenizer.json may make of a text, checked before it gets one.

A normalizer and a decoder replace text by other text, one step after the other, and a
post-processor adds tokens. In a file from a stranger ten short steps make gigabytes of a word, and
the tokenizers package then ends the whole process. Its regular expressions have a limit of steps of
their own; the time that they take all the same is limited where texts are encoded
(`lora_jax.models.text.tokens`).
"""

import base64
import binascii
import json
import math
from collections.abc import Mapping
from typing import Any

import tokenizers

from lora_jax.errors import TokenizerError

_GROWTH = 1_000  # times as long as a text; the normalizers of published models stay below 100
_TOKENS = 100  # that are added to a text
_IDS = 2_000_000  # the largest published vocabularies have about a million tokens


def check(tokenizer: tokenizers.Tokenizer, origin: str) -> None:
    """Raise TokenizerError for a tokenizer that makes too much of a short text."""
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= _IDS:  # to copy the tokenizer, the package lists all numbers that have no token
        raise TokenizerError(
            f"{origin}: it has a token with the id {highest:,}; expected ids below {_IDS:,}. "
            "Is the file from someone you trust?"
        )
    for name in ("normalizer", "decoder"):
        growth = _growth(_state(getattr(tokenizer, name)))
        if growth > _GROWTH:
            raise TokenizerError(
                f"{origin}: its {name} makes texts up to {growth:,} times as long; the limit is "
                f"{_GROWTH:,}. Is the file from someone you trust?"
            )
    for template in _templates(_state(tokenizer.post_processor)):
        for kind in ("single", "pair"):
            _check_pieces(template, kind, origin)


def _state(part: Any) -> Mapping[str, Any]:
    """A part of a tokenizer as the JSON that the package keeps it in."""
    if part is None:
        return {}
    found = json.loads(part.__getstate__())
    return found if isinstance(found, dict) else {}


def _growth(state: Mapping[str, Any]) -> int:
    """Return the factor by which a text may become longer, from the texts in the file."""
    inner = state.get("normalizers") or state.get("decoders") or []
    content = state.get("content") or state.get("prepend") or ""
    own = len(content) + 1 if isinstance(content, str) else 1
    if state.get("type") == "Precompiled":
        own = _longest(state.get("precompiled_charsmap"))
    return own * math.prod(_growth(each) for each in inner if isinstance(each, dict))


def _longest(charsmap: Any) -> int:
    """The longest text in SentencePiece's table: a size, a trie of that size, texts ended by 0."""
    try:
        data = base64.b64decode(charsmap or "")
    except (binascii.Error, ValueError, TypeError):
        return 1
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max((len(text) for text in texts.split(b"\0")), default=0) or 1


def _templates(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    inner = [each for each in state.get("processors") or [] if isinstance(each, dict)]
    own = [state] if state.get("type") == "TemplateProcessing" else []
    return own + [found for each in inner for found in _templates(each)]


def _check_pieces(template: Mapping[str, Any], kind: str, origin: str) -> None:
    texts, types, tokens = [], [0], 0
    for piece in template.get(kind) or []:
        text, token = piece.get("Sequence"), piece.get("SpecialToken")
        types.append((text or token or {}).get("type_id", 0))
        if text is not None:
            texts.append(text.get("id"))
        else:
            special = (template.get("special_tokens") or {}).get((token or {}).get("id")) or {}
            tokens += len(special.get("ids") or ())
    if len(set(texts)) < len(texts) or tokens > _TOKENS or max(types) > 1:
        raise TokenizerError(
            f"{origin}: its post-processor makes {kind} texts of {len(texts)} texts and {tokens} "
            f"special tokens, of token types up to {max(types)}; expected each text once, at most "
            f"{_TOKENS} special tokens, and the types 0 and 1"
        )
