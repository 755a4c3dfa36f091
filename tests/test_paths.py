"""Paths, and the patterns that match them."""

import pytest

from lora_jax import LoraError, paths


@pytest.mark.parametrize(
    ("pattern", "path", "hit"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("b", "a/b", False),
        ("*/kernel", "x/kernel", True),
        ("*/kernel", "x/y/kernel", False),
        ("**/kernel", "kernel", True),
        ("**/kernel", "x/y/kernel", True),
        ("**/kernel", "x/kernels", False),
        ("enc/**", "enc/a/b", True),
        ("enc/**", "encoder/a", False),
        ("enc/**/w", "enc/w", True),
        ("layer_?/w", "layer_1/w", True),
        ("layer_?/w", "layer_12/w", False),
        ("layer_[0-3]/w", "layer_2/w", True),
        ("layer_[!0]/w", "layer_0/w", False),
        ("{query,value}/w", "value/w", True),
        ("{query,value}/w", "key/w", False),
        ("layer_{0..2,10..11}/w", "layer_10/w", True),
        ("layer_{0..2,10..11}/w", "layer_3/w", False),
        ("layer_{0..2}/w", "layer_02/w", False),
        ("a.b/w", "axb/w", False),
        ("**", "any/thing", True),
        ("mix/w[0,0] 2x0e,3x0e", "mix/w[0,0] 2x0e,3x0e", True),
    ],
)
def test_match(pattern: str, path: str, hit: bool) -> None:
    assert paths.match(pattern, path) is hit
    assert paths.matching(pattern, [path]) == [path] * hit


@pytest.mark.parametrize(
    "pattern", ["", "a/{b", "a/[b", "a/b}", "{a/b}", "{3..1}", "{0..99999999}"]
)
def test_patterns_that_cannot_be_read(pattern: str) -> None:
    with pytest.raises(LoraError, match="pattern"):
        paths.match(pattern, "a/b")


def test_replace_keeps_the_rest_and_refuses_unknown_paths() -> None:
    tree = {"a": [1, 2], "b": 3}
    assert paths.replace(tree, {"a/1": 9}) == {"a": [1, 9], "b": 3}
    with pytest.raises(LoraError, match="'c'"):
        paths.replace(tree, {"c": 0})
