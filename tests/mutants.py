"""Make sixty one-line changes of the library, and check that tests notice each of them.

A test suite is as good as the bugs that it finds. This script makes a copy of the tracked files,
applies one change at a time (a mutant), and runs the test that it names: the mutant is killed if
that test fails, and survives if it passes.

    python -m tests.mutants                   all of them, one after the other
    python -m tests.mutants NAME ...          these
    python -m tests.mutants --jobs 2          two at a time, each in a copy of its own
    python -m tests.mutants --list            names, places and tests; runs nothing

Before that, the named tests run on the unchanged code and must pass, because otherwise a failure
means nothing; `--unchecked` leaves this out. The exit status is 0 if all mutants were killed.

A change is an expression and the one that takes its place. It is found by its syntax in a room of
the package, and it must be there exactly once (tests/test_mutants.py), so files may be split,
reformatted and moved within the room. A mutant that survives is not replaced: it shows that a test
is missing.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import functools
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.mutant_table import MUTANTS, Mutant

ROOT = pathlib.Path(__file__).resolve().parents[1]
ONE, ALL = 300, 7200  # seconds that one mutant's test and the tests of all may take


class Place(NamedTuple):
    """A part of a file, in bytes."""

    file: pathlib.Path
    start: int
    end: int


class Result(NamedTuple):
    """A mutant's verdict (killed, SURVIVED, or why there is none) and its first failed test."""

    mutant: Mutant
    verdict: str
    seconds: float
    failed: str


def same(one: object, other: ast.AST) -> bool:
    return type(one) is type(other) and ast.dump(one) == ast.dump(other)


def occurrences(tree: ast.AST, old: str) -> Iterator[ast.expr]:
    """Yield each expression of the tree that `old` describes."""
    word, _, rest = old.partition(" ")
    if word in ("if", "return"):
        wanted: ast.AST = ast.parse(rest, mode="eval").body
        for node in ast.walk(tree):
            if word == "if" and isinstance(node, ast.If | ast.IfExp) and same(node.test, wanted):
                yield node.test
            if word == "return" and isinstance(node, ast.Return) and same(node.value, wanted):
                yield node.value
        return
    if re.match(r'"[\w-]+": ', old):
        wanted = ast.parse("{" + old + "}", mode="eval").body
        key, value = wanted.keys[0], wanted.values[0]
        for node in ast.walk(tree):
            pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
            yield from (x for name, x in pairs if same(name, key) and same(x, value))
        return
    (wanted,) = ast.parse(old).body
    for node in ast.walk(tree):
        if isinstance(wanted, ast.Expr) and same(node, wanted.value):
            yield node
        elif isinstance(wanted, ast.Assign):
            named = same(node, wanted)
            if isinstance(node, ast.keyword) and same(node.value, wanted.value):
                named = node.arg == ast.unparse(wanted.targets[0])
            if named:
                yield node.value


@functools.cache
def parsed(file: pathlib.Path) -> ast.Module:
    """Return the syntax of a file."""
    return ast.parse(file.read_text())


def scopes(tree: ast.Module, name: str) -> Iterator[ast.AST]:
    """Yield the functions, classes and constants of this name; the whole file for no name."""
    if not name:
        yield tree
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else ()
        if name and (getattr(node, "name", "") == name or name in map(ast.unparse, targets)):
            yield node


def places(mutant: Mutant, tree: pathlib.Path) -> list[Place]:
    room, _, scope = mutant.where.partition(":")
    top, found = tree / "lora_jax" / room, set[Place]()
    words = [scope, *re.findall(r"\w+", mutant.old.removeprefix("if ").removeprefix("return "))]
    for file in [top] if top.is_file() else sorted(top.rglob("*.py")):
        lines = file.read_bytes().splitlines(keepends=True)
        if not all(word in file.read_text() for word in words):
            continue
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        for part in scopes(parsed(file), scope):
            for node in occurrences(part, mutant.old):
                start = starts[node.lineno - 1] + node.col_offset
                found.add(Place(file, start, starts[node.end_lineno - 1] + node.end_col_offset))
    return sorted(found)


def misplaced(mutants: Sequence[Mutant], tree: pathlib.Path) -> list[str]:
    """Return a line for each mutant that is not exactly once in the tree, or without its test."""
    lines = []
    for mutant in mutants:
        if len(found := places(mutant, tree)) != 1:
            lines.append(f"{mutant.name}: {len(found)} times in {mutant.where}: {mutant.old}")
        file, _, test = mutant.test.partition("::")
        function = f"def {test.partition('[')[0]}("
        if not (tree / file).is_file() or (test and function not in (tree / file).read_text()):
            lines.append(f"{mutant.name}: there is no {mutant.test}")
    return lines


def copied(folder: pathlib.Path) -> pathlib.Path:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def pytest(tree: pathlib.Path, tests: Sequence[str], timeout: float) -> tuple[str, str]:
    """Return the result of the copy's tests ("passed", "failed", ...), and the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    # Bytecode is off: a file that changes twice in a second may keep the older bytecode.
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {timeout:.0f} s", ""
    first = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    word = {0: "passed", 1: "failed"}.get(done.returncode)
    if word is None:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        word = f"pytest ended with {done.returncode}: {''.join(last)}"
    return word, first[1] if first else ""


def tried(mutant: Mutant, tree: pathlib.Path) -> Result:
    """Apply the mutant in `tree`, run its test, and undo the change."""
    ((file, start, end),), began = places(mutant, tree), time.monotonic()
    text = file.read_bytes()
    file.write_bytes(text[:start] + mutant.new.encode() + text[end:])
    try:
        word, failed = pytest(tree, [mutant.test], ONE)
    finally:
        file.write_bytes(text)
    verdict = {"passed": "SURVIVED", "failed": "killed"}.get(word, word)
    return Result(mutant, verdict, time.monotonic() - began, failed)


def run(mutants: Sequence[Mutant], jobs: int, checked: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [copied(pathlib.Path(folder, str(number))) for number in range(jobs)]
        if lines := misplaced(mutants, trees[0]):
            print("the list does not fit the code:", *lines, sep="\n  ")
            return 2
        if checked:
            tests = list(dict.fromkeys(mutant.test for mutant in mutants))
            began = time.monotonic()
            word, failed = pytest(trees[0], tests, ALL)
            print(f"unchanged code: {word} {failed} {time.monotonic() - began:.0f} s", flush=True)
            if word != "passed":
                return 2
        free = queue.SimpleQueue[pathlib.Path]()
        for tree in trees:
            free.put(tree)

        def one(mutant: Mutant) -> Result:
            tree = free.get()
            try:
                return tried(mutant, tree)
            finally:
                free.put(tree)

        killed = 0
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            for found in pool.map(one, mutants):
                killed += found.verdict == "killed"
                line = f"{found.mutant.name:28} {found.verdict:8} {found.seconds:4.0f} s"
                print(f"{line}  {found.failed}", flush=True)
    print(f"{killed} of {len(mutants)} killed")
    return 0 if killed == len(mutants) else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutants; none: all")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--unchecked", action="store_true", help="not on the unchanged code first")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    options = parser.parse_args()
    unknown = set(options.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no mutant {', '.join(sorted(unknown))}; --list shows them")
    mutants = [m for m in MUTANTS if not options.names or m.name in options.names]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name:28} {mutant.where}", mutant.test, sep="\n    ")
        return 0
    return run(mutants, options.jobs, not options.unchecked)


if __name__ == "__main__":
    sys.exit(main())
