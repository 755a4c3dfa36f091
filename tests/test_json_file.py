"""The only reader of JSON, which is strict; each reader of a kind of file has tests of its own."""

from __future__ import annotations

import json
import time

import pytest

from lora_jax.system import json_file


def parse(text: str) -> object:
    return json_file.parse(text.encode(), "x", ValueError)


def test_what_json_has_is_read_as_json_reads_it() -> None:
    value = {"a": [1, -2.5e3, None, True, "\u00e9\U0001f600", {}], "": []}
    for ascii_only in (True, False):
        assert parse(json.dumps(value, ensure_ascii=ascii_only)) == value
    assert parse("\ufeff3") == 3
    assert json_file.parse(b"[NaN, -Infinity]", "x", ValueError, finite=False)[1] == -float("inf")


@pytest.mark.parametrize("depth", [101, 900, 100_000])
def test_depth(depth: int) -> None:
    assert parse("[" * 100 + "]" * 100) is not None
    assert parse(json.dumps([[]] * 1000)) == [[]] * 1000
    for begin, end in (("[", "]"), ('{"a":', "}")):
        with pytest.raises(ValueError, match="x is nested too deeply"):
            parse(f"{begin * depth}1{end * depth}")


def test_a_key_twice_among_many_is_found_at_once() -> None:
    """A key that occurs twice among many is found without counting each key among all others."""
    names = ", ".join(f'"{i}": 0' for i in range(200_000))
    began = time.monotonic()
    with pytest.raises(ValueError, match="x: the key '199999' is there twice"):
        parse(f'{{{names}, "199999": 1}}')
    assert time.monotonic() - began < 5
