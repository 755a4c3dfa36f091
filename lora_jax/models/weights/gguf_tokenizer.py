"""Build a byte-level BPE tokenizer from a GGUF file's metadata.

The tokenizers package runs it, but reads no GGUF; transformers does, and needs torch for it.
"""

import enum
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lora_jax.models.errors import TokenizerError

# How each kind of text is cut into words before the merges, by GGUF's name of the kind
# (`tokenizer.ggml.pre`). The expressions are those of the models' own tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _words(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


_CUTS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _gpt2,
    "llama-bpe": lambda: _words(_LLAMA3),
    "qwen2": lambda: _words(_QWEN2),
    "smollm": _smollm,
}


class _Kind(enum.IntEnum):
    """GGUF's token types that are not plain pieces of text."""

    CONTROL = 3
    USER_DEFINED = 4


def build(value: Callable[..., Any], origin: str) -> tokenizers.Tokenizer:
    """The tokenizer, with its special tokens; it puts bos and eos where the file says so.

    Args:
        value: (key, default=None) -> the metadata under that key.
        origin: the file, for messages.

    Raises:
        TokenizerError: another kind than byte-level BPE, or an unknown way to cut words.
    """
    kind, cut = value("tokenizer.ggml.model"), value("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in _CUTS:
        raise TokenizerError(
            f"{origin}: the tokenizer is {kind!r} with words cut as {cut!r}; expected 'gpt2' with "
            f"one of {', '.join(sorted(_CUTS))}.\nUse the model's own tokenizer.json instead "
            "(tokenizers.Tokenizer.from_file)."
        )
    tokens: list[str] = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in value("tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token whole, without asking the merges.
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(model)
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _CUTS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    types = value("tokenizer.ggml.token_type", [])
    added = [
        AddedToken(token, special=kind == _Kind.CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=bool(types))
        if kind in tuple(_Kind)
    ]
    tokenizer.add_tokens(added)
    tokenizer.post_processor = _ends(value, tokens)
    return tokenizer


def _ends(value: Callable[..., Any], tokens: list[str]) -> processors.PostProcessor:
    """What stands before and after every text."""
    first, last = value("tokenizer.ggml.bos_token_id"), value("tokenizer.ggml.eos_token_id")
    before = [tokens[first]] if value("tokenizer.ggml.add_bos_token", False) else []
    after = [tokens[last]] if value("tokenizer.ggml.add_eos_token", False) else []
    if not before and not after:
        return processors.ByteLevel(trim_offsets=True)
    ids = {token: index for index, token in ((first, tokens[first]), (last, tokens[last]))}
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=list(ids.items()),
    )
