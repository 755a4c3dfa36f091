"""Build a byte-level BPE tokenizer from a GGUF file's metadata.

The tokenizers package runs it but cannot read GGUF; transformers can, but needs torch for it.
"""

from collections.abc import Mapping
from typing import Any

import tokenizers
from gguf.constants import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lora_jax.errors import TokenizerError, is_failure, shown

# The ways to split a text into words before the merges, by GGUF's name (`tokenizer.ggml.pre`). The
# expressions are copied from the models' own tokenizer.json.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_CUTS: dict[str, list[Any]] = {
    "gpt-2": [_GPT2],
    "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3), behavior="isolated"), _BYTES],
    "qwen2": [pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated"), _BYTES],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), _GPT2],
}


def build(fields: Mapping[str, Any], origin: str) -> tokenizers.Tokenizer:
    """Build the tokenizer of a file's metadata, with its special tokens; it adds bos and eos if the
    file says so.

    `TokenizerError`: the kind is not byte-level BPE, the way to split words is unknown, or the
    lists contradict each other.
    """
    kind, cut = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in list(_CUTS):  # a stranger's value may be unhashable
        raise TokenizerError(
            f"{origin}: the tokenizer is {kind!r} with words cut as {cut!r}; expected 'gpt2' with "
            f"one of {', '.join(sorted(_CUTS))}.\nUse the model's own tokenizer.json instead "
            "(tokenizers.Tokenizer.from_file)."
        )
    try:
        return _built(fields, cut)
    except BaseException as error:  # the tokenizers package raises nothing narrower
        if not is_failure(error):
            raise
        raise TokenizerError(
            f"{origin}: its tokenizer's lists contradict each other, or one is missing: "
            f"{type(error).__name__}: {shown(error)}\nFetch the file again, from someone you trust."
        ) from error


def _built(fields: Mapping[str, Any], cut: str) -> tokenizers.Tokenizer:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3 keeps a word that is a token whole, without applying the merges.
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(model)
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_CUTS[cut])
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type", [])
    added = [
        AddedToken(token, special=kind == TokenType.CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=bool(types))
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    tokenizer.post_processor = _ends(fields, tokens)
    return tokenizer


def _ends(fields: Mapping[str, Any], tokens: list[str]) -> processors.PostProcessor:
    """Return the tokens before and after every text."""
    before, after = (
        [tokens[fields[f"tokenizer.ggml.{end}_token_id"]]]
        if fields.get(f"tokenizer.ggml.add_{end}_token", False)
        else []
        for end in ("bos", "eos")
    )
    if not before and not after:
        return processors.ByteLevel(trim_offsets=True)
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(token, tokens.index(token)) for token in {*before, *after}],
    )
