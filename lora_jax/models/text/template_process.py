"""A process that renders a chat template, which is code of a stranger: run as a script by itself.

The parent is `lora_jax.models.text.chat_template`. This file imports nothing of lora_jax, so that
it starts in a tenth of a second. It reads JSON lines and answers each with one: first the settings
{template, variables}, then conversations {messages, tools, cuts}. A cut (count, generation) asks
for the text of the first `count` messages, with or without the opening of an answer after them.

Templates are written for transformers, so this follows its version 5.24: an immutable sandbox, loop
controls, a block {% generation %} around what the assistant says, tojson without escapes for HTML,
raise_exception and strftime_now. The sandbox is not trusted alone: products and powers are bounded,
output is counted, and the process has a limit of memory; the parent stops it in time.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
from collections.abc import Iterator
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = sys.argv[1:]  # the folders of jinja2 and markupsafe

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

MOST_CHARACTERS = 2**22  # of a rendered conversation
MOST_BYTES = 2**29  # of this process
_MOST_BITS = 2**12  # of a product or power of integers


class Generation(jinja2.ext.Extension):
    """The block {% generation %}...{% endgeneration %}; it notes where its text begins and ends."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own attribute

    def __init__(self, environment: jinja2.Environment) -> None:
        """See jinja2."""
        super().__init__(environment)
        self.pieces: list[str] = []
        self.spans: list[tuple[int, int]] = []

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """See jinja2."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_noted")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _noted(self, caller: Any) -> str:
        text: str = caller()
        start = sum(map(len, self.pieces))
        self.spans.append((start, start + len(text)))
        return text


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment of chat templates, in which no operator makes a huge value."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See jinja2."""
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**":
            fits = not numbers or _bits(left) * abs(right) <= _MOST_BITS
        elif numbers:
            fits = _bits(left) + _bits(right) <= _MOST_BITS
        else:
            number, whole = (left, right) if isinstance(left, int) else (right, left)
            fits = (
                not isinstance(whole, str | list | tuple) or len(whole) * number <= MOST_CHARACTERS
            )
        if not fits:
            raise jinja2.exceptions.SecurityError(f"{operator} makes too large a value")
        return super().call_binop(context, operator, left, right)


def _bits(number: int) -> int:
    return abs(number).bit_length()


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not have the attribute {name!r}")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    names = {"indent", "separators", "sort_keys"} & set(options)
    return json.dumps(value, ensure_ascii=ensure_ascii, **{name: options[name] for name in names})


def environment(day: str | None = None) -> Sandbox:
    """Return the environment in which chat templates are compiled; None is the present moment."""
    made = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise
    time = datetime.datetime
    moment = time.now if day is None else lambda: time.fromisoformat(day)
    made.globals["strftime_now"] = lambda form: moment().strftime(form)
    made.globals["namespace"] = _Namespace
    return made


def render(template: jinja2.Template, values: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text, and the spans (characters) of its {% generation %} blocks."""
    tracker = template.environment.extensions[Generation.identifier]
    assert isinstance(tracker, Generation)
    tracker.pieces, tracker.spans = [], []
    size = 0
    for piece in template.generate(values):
        size += len(piece)
        if size > MOST_CHARACTERS:
            raise jinja2.exceptions.SecurityError(f"more than {MOST_CHARACTERS:,} characters")
        tracker.pieces.append(piece)
    return "".join(tracker.pieces), tracker.spans


def answers(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the answer to each line; {"error": text} if the template fails."""
    settings = json.loads(next(lines))
    made = environment(settings.get("day"))
    try:
        template = made.from_string(settings["template"])
        names = [value for _, kind, value in made.lex(settings["template"]) if kind == "name"]
    except Exception as error:  # noqa: BLE001  anything that jinja2 makes of a stranger's text
        yield {"error": _said(error)}
        return
    yield {"generation": "endgeneration" in names}
    for line in lines:
        asked = json.loads(line)
        try:
            rendered = []
            for count, generation in asked["cuts"]:
                values = {
                    **settings["variables"],
                    "messages": asked["messages"][:count],
                    "tools": asked["tools"],
                    "documents": None,
                    "add_generation_prompt": generation,
                }
                rendered.append(render(template, values))
            yield {"rendered": rendered}
        except (Exception, RecursionError, MemoryError) as error:  # noqa: BLE001  as above
            yield {"error": _said(error)}


def _said(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return f"it needs more than {MOST_BYTES // 2**20:,} MiB of memory"
    line = getattr(error, "lineno", None)
    text = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return f"line {line}: {text}" if line else text


def main() -> None:
    """Answer the lines of stdin until it ends."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    for answer in answers(iter(sys.stdin)):
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
