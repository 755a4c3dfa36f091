"""Match regular expressions of a stranger in bounded time, exactly as Python's `re` does.

Nothing in a process can stop `re`: all but the cheapest patterns are matched in one of their own,
this file as a script, which starts in 15 ms. It reads `[[[form, patterns], ...], names]` as JSON
and prints a line for each pattern: `[[i, group], ...]` of the names that it is the first to match.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

SECONDS, BYTES = 2, 2**29  # of the process
WHOLE = "{}"  # the form of a pattern that matches whole names; all others match their beginnings
_PLAIN = re.compile(r"[\w.-]*")  # a pattern that repeats nothing
_CHEAP = 10**9  # characters of plain patterns times characters of names: 1 s


def first_matches(
    questions: Mapping[str, tuple[str, Iterable[str]]], names: Sequence[str]
) -> dict[str, dict[str, tuple[str, str | None]]]:
    """Return for each setting {name: (the first pattern that matches it, the group "idx")}.

    The questions are `{setting: (form, patterns)}`; `{}` in a form stands for a pattern.
    """
    from lora_jax.errors import LoraError  # here, since the script has no lora_jax
    from lora_jax.exchange.tensor_file import shown

    lists = [(form, list(patterns)) for form, patterns in questions.values()]
    asked = [(setting, p) for setting, q in zip(questions, lists, strict=True) for p in q[1]]
    cost = sum(len(p) for _, p in asked) * sum(map(len, names))
    cheap = cost <= _CHEAP and all(_PLAIN.fullmatch(p) for _, p in asked)
    answers = _answers(lists, names) if cheap else _in_a_process(lists, names)
    found: dict[str, dict[str, tuple[str, str | None]]] = {setting: {} for setting in questions}
    for (setting, pattern), answer in zip(asked, [*answers, None], strict=False):
        if answer is None:
            raise LoraError(
                f"{setting}: matching the pattern {shown(pattern)!r} took more than {SECONDS} s or "
                f"{BYTES / 1e6:,.0f} MB; write the names of the modules in its place, as a list"
            )
        if isinstance(answer, str):
            raise LoraError(f"{setting}: {shown(pattern)!r} is not a pattern: {shown(answer)}")
        found[setting] |= {names[i]: (pattern, number) for i, number in answer}
    return found


def _answers(questions: Iterable[tuple[str, list[str]]], names: Sequence[str]) -> Iterator[Any]:
    for form, patterns in questions:
        left = dict(enumerate(names))
        for pattern in patterns:
            hits = []
            if left:  # an error of a pattern that decides nothing is none
                regex = re.compile(form.format(pattern))
                match = regex.fullmatch if form == WHOLE else regex.match
                hits = [(i, hit) for i, name in left.items() if (hit := match(name))]
            yield [(i, hit.groupdict().get("idx")) for i, hit in hits]
            for i, _ in hits:
                del left[i]


def _in_a_process(questions: Any, names: Any) -> list[Any]:
    """Return the answers, and the text of the error that ended the process if one did."""
    command, question = (
        [sys.executable, "-ISu", "-Wignore", __file__],
        json.dumps((questions, names)),
    )
    try:
        done = subprocess.run(
            command, input=question.encode(), capture_output=True, timeout=SECONDS
        )
        said, error = done.stdout, done.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired as late:
        said, error = late.stdout or b"", ""
    return [*map(json.loads, said.split(b"\n")[:-1]), *error.splitlines()[-1:]]


if __name__ == "__main__":
    with contextlib.suppress(ImportError, ValueError, OSError):  # a system without such limits
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 1))  # if it is orphaned
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    for line in _answers(*json.load(sys.stdin)):
        sys.stdout.write(f"{json.dumps(line)}\n")
