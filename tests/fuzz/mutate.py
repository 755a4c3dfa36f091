"""Changes to JSON and to bytes, drawn from a `random.Random`.

A case is given by its kind, a seed and a number, so any case of CI can be run again by hand.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

SECRET = "../secret.safetensors"  # a valid file outside the case's folder, which no case may open
# fmt: off
TEXTS = (
    "", " ", "a", "\0", "\x1b[2J", "\u202e", "\ud800", "\u00e9\U0001f600", "null", "NaN", "1e999",
    "..", ".", "/", "../x", SECRET, "/etc/passwd", "a/b", "a.b", "a\\b", "C:\\x", "{a}", "{", "%s",
    "(a+)+$", "[", "*", "(?=a)", "x" * 3_000, "__class__", "__metadata__", "base", "default",
)
NUMBERS = (
    0, -1, 1, 2, 3, 255, 256, 1_000, 65_536, 10**9, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63,
    2**64, 10**30, -(2**31), -(2**63), 10**400, 0.0, -0.0, 0.5, 1e-320, 1e30, 1e308, -1.5,
)
RAW = (
    "NaN", "Infinity", "-Infinity", "1e999", "01", "+1", ".5", "tru", "'a'", "", ",", "//", '"\t"',
    '"\\ud800"', '"\\udc00\\ud800"', '"\\x"', "9" * 5_000, "-", "1.", '{"a":1,"a":2}', "\ufeff1",
)
# fmt: on


class Pairs(list[list[Any]]):
    """A JSON object as a list of [key, value], so that it may have a key twice."""


class Literal(str):
    """Text that is written unchanged for a value, whether it is JSON or not."""


def read(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([key, x] for key, x in pairs))


def dump(value: Any) -> str:
    if isinstance(value, Literal):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {dump(x)}" for k, x in value) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dump, value)) + "]"
    return json.dumps(value)


def nested(random: Random) -> Any:
    """Draw a list or an object of many levels."""
    deep = random.choice((3, 40, 101, 2_000, 100_000))
    return Literal(random.choice(("[" * deep + "]" * deep, '{"a":' * deep + "1" + "}" * deep)))


_VALUES: tuple[Callable[[Random], Any], ...] = (
    *(lambda r: r.choice(NUMBERS),) * 3,
    *(lambda r: r.choice(TEXTS),) * 2,
    lambda r: r.choice((None, True, False)),
    lambda r: r.choice(([], Pairs(), [[]], [None], Pairs([["", None]]), [0] * 40)),
    lambda r: r.choices(NUMBERS, k=r.randrange(1, 5)),
    lambda r: r.choices(TEXTS, k=r.randrange(1, 5)),
    lambda r: Pairs([[r.choice(TEXTS), r.choice(NUMBERS)]]),
    lambda r: Literal(r.choice(RAW)),
    nested,
)


def some_value(random: Random) -> Any:
    """Draw a value that is unusual for any field."""
    return random.choice(_VALUES)(random)


def near(random: Random, old: Any) -> Any:
    """Draw a value close to the old one."""
    if isinstance(old, bool) or old is None:
        return random.choice((True, False, None, 0, "true"))
    if isinstance(old, int | float):
        factor = random.choice((2, 10, 1_000, 10**6, 10**12))
        other = float(old) if abs(old) < 1e300 else 0.0
        return random.choice((old + 1, old - 1, -old, other * factor, other, str(old), [old]))
    if isinstance(old, str):
        other = (old + "x", old[:-1], old[::-1], old.upper(), f"../{old}", f"/{old}", old * 50)
        return random.choice((*other, f"{old}\0", f"{old}\ud800", old.replace("_", ""), [old]))
    return random.choice((some_value(random), [old], Pairs([["a", old]])))


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Return (container, index) of every value in the tree."""
    found, left = [], [tree]
    while left:
        one = left.pop()
        if isinstance(one, Pairs):
            inner = [(pair, 1) for pair in one]
        else:
            inner = [(one, i) for i in range(len(one))] if isinstance(one, list) else []
        found += inner
        left += [container[i] for container, i in inner]
    return found


def _containers(tree: Any, kind: type[Any]) -> list[Any]:
    """Return the lists or objects of a tree that are not empty."""
    found = [tree, *(container[i] for container, i in _places(tree))]
    return [x for x in found if isinstance(x, kind) and x]


def _change(random: Random, tree: Any) -> None:
    """Make one change in place."""
    container, i = random.choice(_places(tree))
    some = random.choice(_containers(tree, list))  # `tree` itself is a list
    objects = _containers(tree, Pairs) or [Pairs([["a", 0]])]
    keys = [key for pairs in objects for key, _ in pairs]
    match random.randrange(11):
        case 0 | 1:
            container[i] = some_value(random)
        case 2 | 3 | 4:
            container[i] = near(random, container[i])
        case 5:
            other, j = random.choice(_places(tree))
            container[i], other[j] = copy.deepcopy(other[j]), copy.deepcopy(container[i])
        case 6 | 7:
            del some[random.randrange(len(some))]
        case 8:
            one = random.choice(some)
            some += [copy.deepcopy(one) for _ in range(random.choice((1, 1, 2, 40)))]
        case 9:
            pair = random.choice(random.choice(objects))
            names = (random.choice(TEXTS), random.choice(keys), str(near(random, pair[0])))
            pair[0] = random.choice(names)
        case _:
            random.choice(objects).append([random.choice([*TEXTS, *keys]), some_value(random)])


def json_text(random: Random, text: str | bytes, most: int = 3) -> bytes:
    """Return JSON of a changed structure; in one case of ten, its bytes are changed as well."""
    made = dump(tree_of(random, read(text), most)).encode("utf-8", "surrogatepass")
    return bytes_of(random, made) if random.random() < 0.1 else made


def tree_of(random: Random, value: Any, most: int) -> Any:
    """Make 1 to `most` changes in place in a tree that `read` gave, and return it."""
    tree = [value]  # in a list, so that the whole tree may be replaced too
    for _ in range(random.randint(1, most)):
        if _places(tree):
            _change(random, tree)
    return tree[0] if tree else None


def bytes_of(random: Random, data: bytes) -> bytes:
    """Return the bytes with a few of them flipped, cut, inserted, repeated or removed."""
    made = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        at, size = random.randrange(len(made) + 1), random.choice((1, 1, 2, 4, 8, 64))
        odd = random.choice((b"\0", b"\xff", b"\xed\xa0\x80", b"[", b'"')) * size
        big = random.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little")
        flipped = bytes(x ^ 1 << random.randrange(8) for x in made[at : at + 1])
        start, end, new = random.choice(
            (
                *((at, at + 1, flipped),) * 3,
                (at, len(made), b""),
                (at, at + size, b""),
                (at, at, odd),
                (at, at, made[at : at + size]),
                (at, at + 8, big),
            )
        )
        made[start:end] = new
    return bytes(made)
