"""JSONL and CSV files as a source. (The standard library reads both; errors name the line.)"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lora_jax.data.source import DataSource, no_split
from lora_jax.errors import DataError, nearest
from lora_jax.models.text.example import Example, FileRow, shown
from lora_jax.system import json_file, regular_files

SUFFIXES = (".jsonl", ".csv")


class Files(DataSource):
    """JSONL or CSV files, one for each split.

    The name of the source is a path that contains `{split}`, or parts `split=path` with commas
    between them, or a single path, which is the train split.
    """

    def __init__(self, name: str) -> None:
        """Find the files; `DataError` if there are none."""
        self.name = name
        self._paths = _paths(name)
        self.splits = tuple(self._paths)

    def examples(self, split: str) -> Sequence[Example]:
        """See `DataSource.examples`. The whole file is read."""
        if split not in self._paths:
            raise DataError(
                f"{no_split(self, split)}\n"
                "Name a file for each split: data/{split}.jsonl, or train=a.csv,validation=b.csv"
            )
        path = self._paths[split]
        rows = _jsonl(path) if path.suffix == ".jsonl" else _csv(path)
        if not rows:
            raise DataError(f"{path}: no examples in it")
        return rows


def _paths(name: str) -> dict[str, Path]:
    if "=" in name:
        pairs = [part.partition("=") for part in name.split(",")]
        paths = {split.strip(): Path(path.strip()).expanduser() for split, _, path in pairs}
    elif "{split}" in name:
        paths = _globbed(name)
    else:
        paths = {"train": Path(name).expanduser()}
    for split, path in paths.items():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path} ({split}): expected a file that ends in .jsonl or .csv")
        if not path.is_file():
            neighbours = [p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES]
            what = "a symbolic link to no file" if path.is_symlink() else "no such file"
            raise DataError(
                f"{path} ({split}): {what}.\n"
                f"  nearest: {', '.join(nearest(path.name, neighbours)) or 'none in that folder'}"
            )
    return paths


def _globbed(name: str) -> dict[str, Path]:
    pattern = Path(name).expanduser()
    if "{split}" not in pattern.name or pattern.name.count("{split}") > 1:
        raise DataError(f"{name}: {{split}} must be there once, in the name of the file")
    before, after = map(re.escape, pattern.name.split("{split}"))
    found = {p: re.fullmatch(f"{before}(.+){after}", p.name) for p in pattern.parent.glob("*")}
    paths = {fit.group(1): p for p, fit in sorted(found.items()) if fit}
    if not paths:
        neighbours = sorted(p.name for p in found)[:5]
        raise DataError(
            f"{name}: no file fits.\n  in {pattern.parent}: {', '.join(neighbours) or 'nothing'}"
        )
    return paths


def _jsonl(path: Path) -> list[Example]:
    rows: list[Example] = []
    with regular_files.opened(path, DataError, given=True) as file:
        for number, line in regular_files.lines(file, path, DataError):
            if not line.strip():
                continue
            row = json_file.parse(line, f"{path}:{number}", DataError)
            if not isinstance(row, dict):
                got = type(row).__name__
                raise DataError(f"{path}:{number}: expected an object {{...}}, got a {got}")
            rows.append(FileRow(row, path, number))
    return rows


def _csv(path: Path) -> list[Example]:
    reader = csv.reader(_lines(path), strict=True)
    rows: list[Example] = []
    try:
        header = next(reader, [])
        twice = json_file.first_repeated(header)
        if twice is not None:
            raise DataError(f"{path}:1: {len(header)} columns, {shown(twice)} more than once")
        for values in reader:
            if len(values) != len(header):
                raise DataError(
                    f"{path}:{reader.line_num}: {len(values)} values, but the header names "
                    f"{len(header)}: {', '.join(header)[:500]}"
                )
            row = dict(zip(header, values, strict=True))
            rows.append(FileRow(row, path, reader.line_num))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from error
    return rows


def _lines(path: Path) -> Iterator[str]:
    """Decode the lines of a file one by one, so that an error can name the line."""
    with regular_files.opened(path, DataError, given=True) as file:
        for number, line in regular_files.lines(file, path, DataError):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise DataError(
                    f"{path}:{number} is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"
                ) from None
            yield from io.StringIO(text, newline="")  # a line may end with a carriage return
