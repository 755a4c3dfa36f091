"""The help of a command: its options, from the dataclass that holds them and its docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import tyro

_ARG: Any = type(tyro.conf.arg())
_SPEC = tyro.constructors.PrimitiveConstructorSpec
_HIDDEN = typing.get_args(tyro.conf.Suppress[int])[1]
_POSITIONAL = typing.get_args(tyro.conf.Positional[int])[1]


class Option(NamedTuple):
    """An option: its name, the values it takes ("" for a flag), its default, and its meaning.

    `group` is the meaning of the field that it is nested in, "" for the options of the command.
    """

    name: str
    takes: str
    value: str
    about: str
    group: str


def options(kind: Any, default: Any = None, prefix: str = "", group: str = "") -> Iterator[Option]:
    """Yield the options of a dataclass, with the values of the instance `default` as defaults."""
    hints, said = typing.get_type_hints(kind, include_extras=True), _docstrings(kind)
    for field in dataclasses.fields(kind):
        hint, *marks = typing.get_args(hints[field.name]) or (hints[field.name],)
        if typing.get_origin(hints[field.name]) is not typing.Annotated:
            hint, marks = hints[field.name], []
        if _HIDDEN in marks:
            continue
        arg: Any = next((mark for mark in marks if isinstance(mark, _ARG)), tyro.conf.arg())
        spec = next((mark for mark in marks if isinstance(mark, _SPEC)), None)
        own = field.name.replace("_", "-") if arg.name is None else arg.name
        value = getattr(default, field.name, field.default)
        if value is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        about = arg.help or said.get(field.name, "")
        if dataclasses.is_dataclass(hint):
            inner = f"{prefix}{own}." if own else prefix
            actual = type(value) if dataclasses.is_dataclass(value) else hint
            yield from options(actual, value, inner, about or group)
            continue
        name = own if _POSITIONAL in marks else f"--{prefix}{own}"
        takes, text = arg.metavar or _takes(hint), _text(value)
        if spec is not None:
            takes, text = spec.metavar, " ".join(spec.str_from_instance(value))
        if hint is bool:
            takes, text = "", ""
            if value is True:
                name, about = f"--{prefix}no-{own}", f"Turn this off: {about}"
        yield Option(arg.metavar if _POSITIONAL in marks else name, takes, text, about, group)


def full(found: Sequence[Option], width: int) -> str:
    """Return every option with its whole meaning, by group; no line is longer than `width`."""
    lines, group = ["Options:"], ""
    for one in sorted(found, key=lambda x: (bool(x.group), x.name[0] == "-")):  # a stable order
        if one.group != group:
            group = one.group
            lines += ["", *wrapped(group, width, "")]
        default = f" (default: {one.value})" if one.value else ""
        takes = "" if one.takes == one.name else one.takes
        lines += wrapped(f"{one.name} {takes}".rstrip(), width, "  ", " " * 10)
        lines += wrapped(one.about + default, width, "      ")
    return "\n".join(lines)


def described(text: str, width: int) -> str:
    """Return a docstring with its paragraphs filled up to `width`, and its examples as they are."""
    parts = [part.strip("\n") for part in text.strip().split("\n\n")]
    return "\n\n".join(p if p[:1] == " " else "\n".join(wrapped(p, width, "")) for p in parts)


def wrapped(text: str, width: int, first: str, rest: str | None = None) -> list[str]:
    """Return a text as lines that are filled up to `width`; words are never split."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=first if rest is None else rest,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _docstrings(kind: Any) -> dict[str, str]:
    """Return the docstring of each field, on one line; a class without source has none."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__[:-1]):
        try:
            (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        except (OSError, TypeError):
            continue
        lines = body.body if isinstance(body, ast.ClassDef) else []
        for field, text in itertools.pairwise(lines):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                constant = text.value if isinstance(text, ast.Expr) else None
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                    found[field.target.id] = " ".join(constant.value.split())
    return found


def _takes(hint: Any) -> str:
    """Return what an option takes: INT, {a, b}, [STR ...], or {None}|INT."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _takes(inside[0])
    if origin in (typing.Union, types.UnionType):
        every = sorted(map(_takes, inside), key=lambda one: one != "{None}")
        return "|".join(every)
    if origin is typing.Literal:
        return f"{{{', '.join(map(str, inside))}}}"
    if origin in (tuple, list):
        return f"[{_takes(inside[0])} ...]"
    return "{None}" if hint is type(None) else str(getattr(hint, "__name__", hint)).upper()


def _text(value: Any) -> str:
    if value is dataclasses.MISSING:
        return ""
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return "''" if value == "" else str(value)
