"""TFDS builders without TensorFlow, prepared once as array_record and read with random access.

TFDS's other formats cannot be used: tfrecord needs TensorFlow, and parquet (4.9.10) silently loses
rows.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from lora_jax.data import tensorflow_files
from lora_jax.data.source import DataSource, no_split
from lora_jax.data.status import status
from lora_jax.errors import DataError
from lora_jax.models.text.example import Example
from lora_jax.models.weights.packages import is_full
from lora_jax.system import user_cache

FORMAT = "array_record"
_CHUNK = 1024  # records that are read together


def folder(data_dir: str | None) -> Path:
    """Return the folder of prepared data: `data_dir`, or `data/` in the cache folder (`CacheError`
    if others could have changed that)."""
    return user_cache.folder("data") if data_dir is None else Path(data_dir).expanduser()


def prepare(builder: tfds.core.DatasetBuilder) -> None:
    """Write a builder's data as array_record unless it has been written before.

    TFDS writes into a temporary folder and renames it at the end. So a preparation that was killed
    leaves nothing that a later one would read, and of two at the same time the first to end wins.
    `DataError`: the data exists in a format that needs TensorFlow, or the disk is full.
    """
    path = Path(builder.data_path)
    if path.exists():
        found = builder.info.file_format
        if found is not None and found.value != FORMAT:
            raise DataError(
                f"{builder.info.full_name} is prepared as {found.value} in {builder.data_path}; "
                f"without TensorFlow only {FORMAT} can be read.\n"
                "Point data.data_dir at another folder, where it will be prepared again."
            )
        return
    try:
        with (
            status(f"preparing {builder.info.full_name} once, into {path}"),
            tensorflow_files.stand_in(builder),
            _quiet(),
        ):
            builder.download_and_prepare(file_format=FORMAT)
    except (OSError, RuntimeError) as error:  # the latter by array_record
        if is_full(error):
            said = (getattr(error, "strerror", None) or str(error).splitlines()[0])[:300]
            raise DataError(
                f"{builder.info.full_name} cannot be prepared in {path}: {said}.\n"
                "Make room there, or point data.data_dir (or LORA_JAX_CACHE) at another disk."
            ) from error
        if isinstance(error, RuntimeError) or not path.exists():
            raise
    builder.info.read_from_directory(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide TFDS's nested progress bars and its line on stdout, but not its warnings."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()


class TextBuilder(tfds.core.GeneratorBasedBuilder):
    """The base class of our own builders, which name their fields and return splits as lists."""

    def fields(self) -> dict[str, Any]:
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        text = sys.modules[type(self).__module__].__doc__
        features = tfds.features.FeaturesDict(self.fields())
        return tfds.core.DatasetInfo(builder=self, description=text, features=features)

    def _generate_examples(self, pipeline: Any) -> Any:  # required by TFDS, and never called
        raise NotImplementedError


class Builder(DataSource):
    """A TFDS builder as a source. A slice of a split, such as `train[:90%]`, can be read, too."""

    def __init__(
        self, builder: tfds.core.DatasetBuilder, name: str, notes: tuple[str, ...] = ()
    ) -> None:
        """Prepare the builder if its data is not there yet."""
        prepare(builder)
        self._builder, self.name, self.notes = builder, name, notes
        self.splits = tuple(builder.info.splits)

    def examples(self, split: str) -> Sequence[Example]:
        info = self._builder.info
        try:
            expected = info.splits[split].num_examples
        except (KeyError, ValueError) as error:
            raise no_split(self, split) from error
        for name in self.splits:
            if name in split:  # a slice or a sum of splits contains their names
                self._count(name)
        fields = dict(info.features).items()  # TFDS would decode an image with OpenCV
        images = [name for name, kind in fields if isinstance(kind, tfds.features.Image)]
        as_stored = {name: tfds.decode.SkipDecoding() for name in images}
        source = self._builder.as_data_source(split, decoders=as_stored or None)
        records = ArrayRecords(source, images)
        assert len(records) == expected, (len(records), expected)
        return records

    def _count(self, split: str) -> None:
        """Compare the number of records in the files with the metadata.

        The length of a TFDS data source comes from the metadata, so it proves nothing.
        """
        info = self._builder.info.splits[split]
        for path, expected in zip(info.filepaths, info.shard_lengths, strict=True):
            reader = ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
            if found != expected:
                raise DataError(
                    f"{self.name}: {found} records in {path}, but {expected} were written.\n"
                    f"Delete {self._builder.data_path}; the next run prepares it again."
                )

    def classes(self, field: str) -> tuple[str, ...] | None:
        feature = dict(self._builder.info.features).get(field)
        if isinstance(feature, tfds.features.ClassLabel):
            if feature.names:
                return tuple(feature.names)
            return tuple(map(str, range(feature.num_classes))) if feature.num_classes else None
        if feature is not None and np.issubdtype(feature.np_dtype, np.floating):
            return ()
        return None


class ArrayRecords(Sequence[Example]):
    """TFDS records with text as `str`; numbers are Python numbers already."""

    def __init__(self, records: Any, encoded: Sequence[str] = ()) -> None:
        """Wrap the return value of `builder.as_data_source`; `encoded` fields (images) stay
        `bytes`."""
        self._records, self._encoded = records, frozenset(encoded)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            # One call reads neighbours together, which is five times as fast as one by one.
            rows = self._records.__getitems__(range(*index.indices(len(self))))
            return [self._example(row) for row in rows]
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends an iteration over the sequence
        return self._example(self._records[index])

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), _CHUNK):
            yield from self[start : start + _CHUNK]

    def _example(self, row: Mapping[str, Any]) -> Example:
        text = {k for k, v in row.items() if isinstance(v, bytes)} - self._encoded
        return {k: v.decode() if k in text else v for k, v in row.items()}
