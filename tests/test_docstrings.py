"""Names of the API reference explain their parameters; all docstrings are in plain English.

Docstrings have Google's sections. A method that overrides another may inherit its docstring. What
the reference does not list needs no sections.
"""

import ast
import dataclasses
import inspect
import io
import itertools
import pathlib
import re
import textwrap
import tokenize
import types
from collections.abc import Iterator
from typing import Any

import flax.linen

from docs import public

ROOT = pathlib.Path(__file__).resolve().parents[1]

FLAX_FIELDS = ("parent", "name")  # every Linen module has them


def public_symbols() -> dict[str, Any]:
    """Return the functions and classes of the API reference, and methods of the main modules'."""
    found: dict[str, Any] = {}
    for name, value in public.names().items():
        if inspect.isfunction(value) or inspect.isclass(value):
            found[name] = value
        if inspect.isclass(value) and name.rpartition(".")[0] in public.MODULES:
            own = (types.FunctionType, staticmethod, classmethod, property)
            for attribute, method in vars(value).items():
                if not attribute.startswith("_") and isinstance(method, own):
                    found[f"{name}.{attribute}"] = getattr(value, attribute)
    return found


def parameters(value: Any) -> list[str]:
    """Return the names that a docstring must explain, without fields that callers cannot set."""
    if isinstance(value, property):
        return []
    if inspect.isclass(value):
        if issubclass(value, BaseException) or inspect.isabstract(value):
            return []
        if "__new__" not in vars(value) and value.__init__ is object.__init__:
            return []
    names = [n for n in inspect.signature(value).parameters if not n.startswith("_")]
    skipped = {"self", "cls"}
    if dataclasses.is_dataclass(value) and issubclass(value, flax.linen.Module):
        skipped |= set(FLAX_FIELDS)
    return [name for name in names if name not in skipped]


def explained(doc: str) -> set[str]:
    """Return the names that the sections Args and Attributes of a docstring explain."""
    names: set[str] = set()
    section, indent = "", 0
    for line in doc.splitlines():
        if heading := re.fullmatch(r"(\s*)([A-Z][\w ]*(?: \(.*\))?):\s*", line):
            section, indent = heading[2], len(heading[1])
        elif section in ("Args", "Attributes"):
            entry = re.match(rf"\s{{{indent + 2}}}((?:\*{{0,2}}\w+, )*\*{{0,2}}\w+):(?: |$)", line)
            names |= {n.strip().lstrip("*") for n in entry[1].split(",")} if entry else set()
    return names


def explained_below(cls: type) -> set[str]:
    """Return the fields of a class and its bases that have a docstring, which is tyro's help."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.startswith("lora_jax"):
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
            for field, below in itertools.pairwise(body):
                doc = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                if isinstance(field, ast.AnnAssign) and doc:
                    names.add(field.target.id)
    return names


def unexplained(name: str, value: Any) -> list[str]:
    """Return what is missing in the docstring of a symbol."""
    doc = inspect.getdoc(value) or ""
    # For a class without a docstring, dataclasses and NamedTuples write `Name(field, ...)`.
    if not doc.strip() or doc.startswith(f"{name.rpartition('.')[2]}("):
        return [f"{name} has no docstring of its own"]
    classes = inspect.getmro(value) if inspect.isclass(value) else ()
    ours = [each for each in classes if each.__module__.startswith("lora_jax")]
    docs = [each.__doc__ or "" for each in ours] + [each.__init__.__doc__ or "" for each in ours]
    known = explained(doc).union(*map(explained, docs))
    known |= explained_below(value) if classes else set()
    missing = [each for each in parameters(value) if each not in known]
    return [f"{name}: its Args do not explain {', '.join(missing)}"] if missing else []


def test_public_symbols_explain_their_parameters() -> None:
    found = [line for name, value in public_symbols().items() for line in unexplained(name, value)]
    assert not found, "\n".join(found)


# Words and openings that CONTRIBUTING.md's rules for docstrings leave out.
WORDS = re.compile(
    r"\b(beside|lies?|how far|whatever|as far as|(?:of )?those (?:of|that)|(?<!there )(?:is|are) no"
    r")\b(?! longer| more)",
    re.IGNORECASE,
)
OPENINGS = re.compile(r"(?:Of|Where|What|As far|How far|Whatever|Those)\b")


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every docstring, of fields too, and of every `help=`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.lineno, inspect.cleandoc(node.value.value)
        elif isinstance(node, ast.keyword) and node.arg in ("help", "description"):
            text = getattr(node.value, "value", None)
            if isinstance(text, str):
                yield node.value.lineno, text


def comments(text: str) -> Iterator[tuple[int, str]]:
    """Yield (first line, text) of every comment; comments on consecutive lines are one comment."""
    last, start, words = 0, 0, ""  # `last`: a line whose comment the next line may continue
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, own_line = token.start[0], token.line.lstrip().startswith("#")
        if line == last + 1 and own_line:
            words += " " + token.string.lstrip("# ")
        else:
            if words:
                yield start, words
            start, words = line, token.string.lstrip("# ")
        last = line if own_line else 0
    if words:
        yield start, words


def faults(path: pathlib.Path) -> list[str]:
    """Return a line for each word and opening in the file that plain English leaves out."""
    text, name = path.read_text(), path.relative_to(ROOT).as_posix()
    found = []
    for line, words in [*docstrings(ast.parse(text)), *comments(text)]:
        prose = " ".join(re.sub(r">>>.*|``?[^`]*``?", "", words).split())
        hits = [m.start() for m in WORDS.finditer(prose)]
        hits += [0] if OPENINGS.match(prose) else []
        for start in hits:
            found.append(f"{name}:{line}: ...{prose[max(0, start - 30) : start + 50]}...")
    return found


def test_plain_english() -> None:
    folders = ("lora_jax", "configs", "experiments", "measuring")
    folders += ("tests", "benchmarks", "docs", ".ci")
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    found = [fault for path in (ROOT / "train.py", *files) for fault in faults(path)]
    assert not found, "\n".join(found)
