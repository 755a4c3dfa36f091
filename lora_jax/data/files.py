"""JSONL, JSON, CSV and Parquet files as a source; errors name the line."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from lora_jax.data import status
from lora_jax.data.source import DataSource, no_split
from lora_jax.errors import DataError, nearest
from lora_jax.models.text.example import Example, FileRow, shown
from lora_jax.system import json_file, regular_files

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet", ".json")
_MOST_UNPACKED = 2**32  # bytes
_MOST_JSON = 2**30  # bytes


class Files(DataSource):
    """JSONL, CSV or Parquet files, one for each split.

    The name of the source is a path that contains `{split}`, or parts `split=path` with commas
    between them, or a single path, which is the train split.
    """

    def __init__(self, name: str) -> None:
        """Find the files; `DataError` if there are none."""
        self.name = name
        self._paths = _paths(name)
        self.splits = tuple(self._paths)
        self._read: dict[Path, Sequence[Example]] = {}

    @property
    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """Absolute path, time of the last change and size of each file."""
        found = ((str(path.absolute()), path.stat()) for path in self._paths.values())
        return tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in found)

    def examples(self, split: str) -> Sequence[Example]:
        """See `DataSource.examples`. A file is read once."""
        if split not in self._paths:
            raise DataError(
                f"{no_split(self, split)}\n"
                "Name a file for each split: data/{split}.jsonl, or train=a.csv,validation=b.csv"
            )
        path = self._paths[split]
        if path not in self._read:
            rows = _READERS[_suffix(path)](path)
            if not rows:
                raise DataError(f"{path}: no examples in it")
            self._read[path] = rows
        return self._read[path]


def _paths(name: str) -> dict[str, Path]:
    if "=" in name:
        pairs = [part.partition("=") for part in name.split(",")]
        paths = {split.strip(): Path(path.strip()).expanduser() for split, _, path in pairs}
    elif "{split}" in name:
        paths = _globbed(name)
    else:
        paths = {"train": Path(name).expanduser()}
    for split, path in paths.items():
        if not _suffix(path):
            raise DataError(f"{path} ({split}): expected a file that ends in {', '.join(SUFFIXES)}")
        if not path.is_file():
            neighbours = [p.name for p in path.parent.glob("*") if _suffix(p)]
            what = "a symbolic link to no file" if path.is_symlink() else "no such file"
            raise DataError(
                f"{path} ({split}): {what}.\n"
                f"  nearest: {', '.join(nearest(path.name, neighbours)) or 'none in that folder'}"
            )
    return paths


def _suffix(path: Path) -> str:
    return next((s for s in SUFFIXES if path.name.endswith(s)), "")


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


class JsonLines(Sequence[Example]):
    """The rows of a JSONL file. Every line is checked first; later a row is read when it is needed,
    so that a million lines take 16 MB."""

    def __init__(self, path: Path) -> None:
        """Check every line, and note where each begins."""
        self._path, self._file = path, regular_files.opened(path, DataError, given=True)
        weakref.finalize(self, self._file.close)
        size, place = os.fstat(self._file.fileno()).st_size, 0
        found: list[tuple[int, int]] = []  # the start and the number of each line
        with status.bytes_read(f"reading {path.name}", size) as read:
            for number, line in regular_files.lines(self._file, path, DataError):
                if line.strip():
                    _object(line, path, number)
                    found.append((place, number))
                place += len(line)
                read(place)
        self._lines = np.array(found, np.int64).reshape(-1, 2)
        self._ends = np.append(self._lines[1:, 0], place)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends an iteration over the sequence
        start, number = self._lines[index].tolist()
        line = os.pread(self._file.fileno(), int(self._ends[index]) - start, start)
        return _object(line, self._path, number)


def _object(line: bytes, path: Path, number: int) -> FileRow:
    row = json_file.parse_object(line.strip(), f"{path}:{number}", DataError)
    return FileRow(row, path, number)


def _packed_jsonl(path: Path) -> list[Example]:
    """Read a JSONL file that gzip has packed, into memory."""
    rows: list[Example] = []
    with regular_files.opened(path, DataError, given=True) as packed, gzip.open(packed) as file:
        try:
            lines = regular_files.lines(cast(IO[bytes], file), path, DataError)
            for number, line in lines:
                if file.tell() > _MOST_UNPACKED:
                    raise DataError(
                        f"{path}: more than {_MOST_UNPACKED:,} bytes when unpacked; unpack it first"
                    )
                if line.strip():
                    rows.append(_object(line, path, number))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} is not whole, or not packed by gzip: {error}") from None
    return rows


def _json(path: Path) -> list[Example]:
    """Read a JSON file with a list of objects, or an object of objects; the line of an example is
    its place among them."""
    data = regular_files.read(path, DataError, most=_MOST_JSON, given=True)
    rows = json_file.parse(data, str(path), DataError)
    rows = list(rows.values()) if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{path}: expected a list of objects [{{...}}, ...]; with an object on each line, the "
            "name of a file ends in .jsonl"
        )
    return [FileRow(row, path, number) for number, row in enumerate(rows, 1)]


def _parquet(path: Path) -> list[Example]:
    regular_files.check(path, DataError, given=True)
    try:
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise DataError(f"{path}: Parquet files need pyarrow (pip install pyarrow)") from None
    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error)[:300]}") from None
    return [FileRow(row, path, number) for number, row in enumerate(rows, 1)]


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


_READERS: Mapping[str, Callable[[Path], Sequence[Example]]] = dict(
    zip(SUFFIXES, (JsonLines, _packed_jsonl, _csv, _parquet, _json), strict=True)
)
