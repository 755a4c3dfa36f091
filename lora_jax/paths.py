"""The text of a pytree path, and the pattern language that matches it.

A path is the keys from the root joined by `/`: `encoder/layer_0/query/kernel`. A pattern
must match the **whole** path. It also matches the path that it spells: `w[0,0]`, a name of e3nn.

    *        any characters inside one segment        layer_*/kernel
    ?        one character inside one segment         layer_?/kernel
    [ab]     one of these characters                  layer_[01]/kernel
    {a,b}    either text (no nesting)                 {query,value}/kernel
    {0..5}   a number from the first to the last      layer_{0..5}/kernel
    **       any number of whole segments, also none  **/attention/**/kernel

>>> match("encoder/layer_*/{query,value}/kernel", "encoder/layer_3/query/kernel")
True
>>> match("*/kernel", "encoder/layer_3/query/kernel")
False
>>> match("**/kernel", "encoder/layer_3/query/kernel"), match("w[0,0]", "w[0,0]")
(True, True)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

import jax

from lora_jax.base import is_base
from lora_jax.errors import LoraError

Tree = Any  # a pytree


def path_of(key_path: tuple[Any, ...]) -> str:
    """Return a key path of `jax.tree_util` as text.

    Args:
      key_path: the tuple of keys that `jax.tree_util.tree_map_with_path` passes.

    Returns:
      The keys joined by `/`.

    >>> [(key_path, _)] = jax.tree_util.tree_leaves_with_path({"layers": [{"kernel": 0}]})
    >>> path_of(key_path)
    'layers/0/kernel'
    """
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Return the leaves of a tree by path.

    Args:
      tree: a pytree. A quantised base counts as one leaf.

    Returns:
      `{path: leaf}` in the order of the tree.

    >>> flatten({"layer": {"kernel": 1, "bias": 2}})
    {'layer/bias': 2, 'layer/kernel': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_base)
    return {path_of(p): leaf for p, leaf in leaves}


def shapes(tree: Tree) -> dict[str, str]:
    """Return the dtype and shape of each leaf by path, as messages show them.

    Args:
      tree: a pytree of arrays, `jax.ShapeDtypeStruct`s or quantised bases.

    Returns:
      `{path: text}` in the order of the tree.

    >>> shapes({"w": jax.ShapeDtypeStruct((2, 3), "float32")})
    {'w': 'float32[2, 3]'}
    """
    return {path: f"{x.dtype}{list(x.shape)}" for path, x in flatten(tree).items()}


def replace(tree: Tree, leaves: dict[str, Any]) -> Tree:
    """Return `tree` with the leaves at the given paths replaced and all others kept.

    Args:
      tree: a pytree; it is not changed.
      leaves: `{path: new leaf}`.

    Returns:
      A tree of the same structure.

    Raises:
      LoraError: a path that is not in the tree.

    >>> replace({"a": 1, "b": 2}, {"b": 5})
    {'a': 1, 'b': 5}
    """
    known = flatten(tree)
    unknown = [path for path in leaves if path not in known]
    if unknown:
        raise LoraError(f"no leaf at {unknown[0]!r} in the tree; it has {list(known)}")
    return jax.tree_util.tree_map_with_path(
        lambda p, leaf: leaves.get(path_of(p), leaf), tree, is_leaf=is_base
    )


def match(pattern: str, path: str) -> bool:
    """Return whether `pattern` matches the whole of `path`.

    Args:
      pattern: in the language that the module's docstring explains.
      path: keys joined by `/`.

    Raises:
      LoraError: a pattern that cannot be read.
    """
    return _compiled(pattern).fullmatch(path) is not None


def matching(pattern: str, paths: Iterable[str]) -> list[str]:
    """Return the paths that a pattern matches.

    Args:
      pattern: in the language that the module's docstring explains.
      paths: keys joined by `/`.

    Returns:
      The matching paths, in their order.

    Raises:
      LoraError: a pattern that cannot be read.

    >>> matching("**/kernel", ["a/kernel", "a/bias"])
    ['a/kernel']
    """
    regex = _compiled(pattern)
    return [p for p in paths if regex.fullmatch(p)]


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    if not pattern:
        raise LoraError("a pattern may not be empty; '**' matches every path")
    segments = pattern.split("/")
    out = ""
    for i, segment in enumerate(segments):
        last = i == len(segments) - 1
        if segment == "**":
            out += ".*" if last else "(?:[^/]+/)*"
        else:
            out += _segment(segment, pattern) + ("" if last else "/")
    return re.compile(f"{re.escape(pattern)}|(?:{out})")


_TOKEN = re.compile(r"\*|\?|\[[^\[\]/]+\]|\{[^{}/]*\}|[^\[\]{}*?]")
_TOKENS = re.compile(f"(?:{_TOKEN.pattern})*")
_RANGE = re.compile(r"([0-9]{1,9})\.\.([0-9]{1,9})")
_MOST = 10_000  # numbers of a range
_WILD = {"*": "[^/]*", "?": "[^/]"}


def _segment(segment: str, pattern: str) -> str:
    if rest := _TOKENS.sub("", segment, count=1):
        raise LoraError(
            f"pattern {pattern!r} cannot be read at {rest!r}: "
            "brackets must close inside one segment and may not nest"
        )
    return _TOKEN.sub(lambda token: _translate(token.group()), segment)


def _translate(token: str) -> str:
    if token in _WILD:
        return _WILD[token]
    if token[0] == "[" and len(token) > 1:
        body = token[1:-1].replace("\\", "\\\\")
        return "[" + ("^" + body[1:] if body[0] == "!" else body) + "]"
    if token[0] == "{" and len(token) > 1:
        return "(?:" + "|".join(_alternative(t) for t in token[1:-1].split(",")) + ")"
    return re.escape(token)


def _alternative(text: str) -> str:
    """`a`, or `0..5`."""
    numbers = _RANGE.fullmatch(text)
    if numbers is None:
        return re.escape(text)
    first, last = map(int, numbers.groups())
    if not first <= last < first + _MOST:
        raise LoraError(
            f"the range {text!r} of a pattern must go from a smaller number to a larger one, and "
            f"hold at most {_MOST:,} of them"
        )
    return "|".join(map(str, range(first, last + 1)))
