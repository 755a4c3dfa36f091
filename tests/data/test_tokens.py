"""Tokenised rows, and the count of tokens that truncation cut off."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from lora_jax.data import DataError
from lora_jax.models.text.tokens import Encoder, TextOrPair, TextTruncation, collect, padding_id


def test_rows_come_back_as_they_went_in() -> None:
    rows = [
        (np.arange(n, dtype=np.int32) * 70_000, np.full(n, n % 7, np.uint8)) for n in (3, 0, 1, 500)
    ]
    tokens = collect(iter(rows))
    assert len(tokens) == 4
    assert tokens.lengths.tolist() == [3, 0, 1, 500]
    for (ids, marks), (kept_ids, kept_marks) in zip(rows, tokens, strict=True):
        assert ids.tolist() == kept_ids.tolist()
        assert marks.tolist() == kept_marks.tolist()
    with pytest.raises(IndexError):
        tokens[4]


def test_each_chunk_is_cut_and_counted_alike(words: Tokenizer) -> None:
    encoder, cut = Encoder(words, 5), TextTruncation()
    for chunk in (1, 2):
        (short, long) = encoder.truncate(["w0", "w0 w1 w2 w3 w4"], cut)
        assert (len(short), len(long)) == (3, 5)
        assert (cut.examples, cut.tokens) == (chunk, 2 * chunk)


def test_a_token_that_the_model_lacks(words: Tokenizer) -> None:
    encoder = Encoder(words, 8, vocabulary=54)  # w48 is the last
    assert encoder.plain(["w48", ""]) == [[53], []]
    for call in (encoder.plain, lambda texts: encoder.truncate(texts, TextTruncation())):
        with pytest.raises(DataError, match=r"token 54 \('w49'\), and the model has embeddings"):
            call(["w1", "w2 w49"])


def test_half_a_character(words: Tokenizer) -> None:
    encoder = Encoder(words, 8)
    pair: list[TextOrPair] = [("w1", "w2"), ("w1", "w2 \udcff")]
    for call in (
        lambda: encoder.plain(["w1", "w2 \udcff"]),
        lambda: encoder.truncate(pair, TextTruncation()),
    ):
        with pytest.raises(DataError, match=r"'w2 \\udcff' holds half a character"):
            call()


def test_an_expression_without_end() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), behavior="isolated")
    with pytest.raises(DataError, match=r"fails on one of 2 texts: .*retry-limit"):
        Encoder(tokenizer, 8).plain(["a", "a" * 40 + "b"])


def test_no_rows() -> None:
    assert len(collect(iter([]))) == 0


@pytest.mark.parametrize(("name", "id"), [("<pad>", 1), ("[PAD]", 1), ("other", 0)])
def test_padding(name: str, id: int) -> None:
    assert padding_id(Tokenizer(models.WordLevel({"a": 0, name: 1}))) == id


def test_padding_set_in_the_tokenizer(minilm: Tokenizer) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[PAD]": 1}))
    tokenizer.enable_padding(pad_id=7)
    assert padding_id(tokenizer) == 7
    assert padding_id(minilm) == 0
