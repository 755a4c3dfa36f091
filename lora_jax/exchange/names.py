"""The table of names, applied to one tree: from a tensor of a file to a parameter and back."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax import paths
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.models.hf_module import HfModule, HfNames

HOLE = re.compile(r"\{(\w+(?:\|\w+)*)\}")  # a number, or one of several words: {gate|up}


class TensorPlace(NamedTuple):
    """The place of a tensor in the tree.

    path: the path of the parameter.
    entry: its entry in the table.
    at: the index along the stack axes of the parameter, in the order of the name.
    tied: whether it is the output head that shares an embedding.
    """

    path: str
    entry: HfModule
    at: tuple[int, ...]
    tied: bool = False


class NameTable:
    """The names of the parameters of one tree."""

    def __init__(self, names: HfNames | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Apply names to paths; None: the paths are Hugging Face's names."""
        self._names, self.shapes = names, shapes
        self._entries = dict(_entries(names, shapes))
        self._exact: dict[str, list[TensorPlace]] = {}
        self._stacked: list[tuple[re.Pattern[str], list[str], str, HfModule, bool]] = []
        for path, entries in self._entries.items():
            for entry, template in entries:
                self._add(path, entry, template, False)
                if entry.tied:
                    self._add(path, entry, f"{entry.tied}.weight", True)

    @classmethod
    def of(cls, names: HfNames | None, params: Any) -> NameTable:
        """Return the table of a tree of arrays or shapes."""
        return cls(names, {path: tuple(x.shape) for path, x in paths.flatten(params).items()})

    def _add(self, path: str, entry: HfModule, template: str, tied: bool) -> None:
        if holes := _holes(template):
            self._stacked.append((_regex(template), holes, path, entry, tied))
        else:
            self._exact.setdefault(template, []).append(TensorPlace(path, entry, (), tied))

    def find(self, tensor: str) -> list[TensorPlace]:
        """Return the places of a tensor; there are several if the module is fused."""
        found = list(self._exact.get(tensor, ()))
        for regex, holes, path, entry, tied in self._stacked:
            if match := regex.fullmatch(tensor):
                at = tuple(map(_index, holes, match.groups()))
                found.append(TensorPlace(path, entry, at, tied))
        return found

    def near(self, tensor: str) -> str:
        """Return the known names that are closest to one that was not found, for a message."""
        known = [t for rows in self._entries.values() for _, t in rows]
        return listed(nearest(tensor, known))

    def entries(self, path: str) -> list[HfModule]:
        """Return the entries of the table for a parameter."""
        if path not in self._entries:
            raise LoraError(
                f"the names say nothing of {path!r}; nearest:\n"
                f"{listed(nearest(path, self._entries))}\nAdd it: {{{path!r}: 'its.module'}}"
            )
        return [entry for entry, _ in self._entries[path]]

    def tensors(
        self, path: str, entry: HfModule, stack: Sequence[int]
    ) -> Iterator[tuple[tuple[int, ...], str]]:
        """Yield the tensor's name for each index along the stack axes, whose sizes are given."""
        template = self.template(path, entry)
        holes = _holes(template)
        counted = zip(holes, stack, strict=False)
        texts = [h.split("|") if "|" in h else [*map(str, range(n))] for h, n in counted]
        if len(holes) != len(stack) or [*map(len, texts)] != [*stack]:
            raise LoraError(
                f"{path!r} has {len(stack)} stack axes, of the sizes {[*stack]}, and its name "
                f"{template!r} has numbers or words for {len(holes)}"
            )
        for index in itertools.product(*map(range, stack)):
            name = template
            for hole, text, i in zip(holes, texts, index, strict=True):
                name = name.replace(f"{{{hole}}}", text[i])
            yield index, name

    def speaks_of(self, tensor: str) -> bool:
        """Return whether the table has a name for a tensor, with or without a parameter here."""
        if self._names is None:
            return bool(self.find(tensor))
        modules = [
            _filled(path, entry, {})[1]
            for path, value in self._names.items()
            for entry in _listed_entries(value)
        ]
        return any(_regex(template).fullmatch(tensor) for template in modules)

    def paths(self) -> list[str]:
        return list(self._entries)

    def holes(self, path: str, entry: HfModule) -> int:
        """Return the number of stack axes that the name counts."""
        return len(_holes(self.template(path, entry)))

    def template(self, path: str, entry: HfModule) -> str:
        """Return the tensor's name, with a hole for each number along a stack axis."""
        return next(t for e, t in self._entries[path] if e == entry)


def written(entries: list[HfModule]) -> list[HfModule]:
    """Return one module for each part: the first in the table."""
    return list({entry.part: entry for entry in reversed(entries)}.values())[::-1]


def _entries(
    names: HfNames | None, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, list[tuple[HfModule, str]]]]:
    """Yield for each path its modules, each with the tensor's name, which may have holes."""
    if names is None:
        for path, shape in shapes.items():
            yield path, [_own_name(path, shape)]
        return
    table = [(_regex(pattern), value) for pattern, value in names.items()]
    for path in shapes:
        for regex, value in table:
            if match := regex.fullmatch(path):
                known = match.groupdict()
                yield path, [_filled(path, entry, known) for entry in _listed_entries(value)]
                break


def _listed_entries(value: str | HfModule | Sequence[HfModule]) -> list[str | HfModule]:
    return [value] if isinstance(value, str | HfModule) else list(value)


def _filled(path: str, entry: str | HfModule, known: Mapping[str, str]) -> tuple[HfModule, str]:
    entry = HfModule(entry) if isinstance(entry, str) else entry
    return entry, HOLE.sub(lambda m: known.get(m[1], m[0]), entry.tensor(path))


def _own_name(path: str, shape: tuple[int, ...]) -> tuple[HfModule, str]:
    """Return the entry of a path that is Hugging Face's name already, in a tree or a flat dict."""
    name = path.replace("/", ".")
    last = name.rpartition(".")[2]
    if last in ("weight", "bias"):
        conv = last == "weight" and len(shape) > 2
        return HfModule(name, layer="conv" if conv else "", transposed=False), name
    if len(shape) == 3:  # the experts of a mixture in one parameter
        module, _, parameter = name.rpartition(".")
        name = f"{module}.{{expert}}.{parameter}.weight"
        return HfModule(name, layer="experts", transposed=False), name
    return HfModule(name, transposed=False), name


def _holes(template: str) -> list[str]:
    return list(dict.fromkeys(HOLE.findall(template)))


def _index(hole: str, text: str) -> int:
    return hole.split("|").index(text) if "|" in hole else int(text)


def _regex(pattern: str) -> re.Pattern[str]:
    """Return a regex of the pattern, in which every hole is a number or one of its words."""
    seen: set[str] = set()
    out, end = "", 0
    for hole in HOLE.finditer(pattern):
        name, value = hole[1].replace("|", "_or_"), hole[1] if "|" in hole[1] else r"\d{1,9}"
        group = f"(?P={name})" if name in seen else f"(?P<{name}>{value})"
        seen.add(name)
        out += re.escape(pattern[end : hole.start()]) + group
        end = hole.end()
    return re.compile(out + re.escape(pattern[end:]))
