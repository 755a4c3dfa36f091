"""The catalogue of data sources, which opens each source by its name."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from lora_jax.data.builders import FORMAT, Builder, folder
from lora_jax.data.config import ExamplesConfig
from lora_jax.data.files import SUFFIXES, Files
from lora_jax.data.reviews import NOTE as REVIEWS_NOTE
from lora_jax.data.reviews import MovieReviews
from lora_jax.data.set_apart import SetApart
from lora_jax.data.source import DataSource
from lora_jax.data.topics import CORPORA, Topics
from lora_jax.data.wordnet import NOTE as WORDNET_NOTE
from lora_jax.data.wordnet import WordnetDefinitions
from lora_jax.errors import DataError, nearest
from lora_jax.system.extras import require

# Name -> a function that makes the builder, and a note for readers of the results.
_OURS: dict[str, tuple[Callable[..., tfds.core.DatasetBuilder], str]] = {
    "reviews": (MovieReviews, REVIEWS_NOTE),
    "wordnet": (WordnetDefinitions, WORDNET_NOTE),
    **{n: (functools.partial(Topics, config=n), corpus.note) for n, corpus in CORPORA.items()},
}

# TFDS registers these builders when their package is imported, which it does by itself only if
# TensorFlow is installed.
_PACKAGES = ("text", "question_answering", "summarization", "translate", "text_simplification") + (
    "image_classification",
)


def open_source(name: str, data_dir: str | None = None) -> DataSource:
    """Open a source, and prepare its data if it is not there yet.

    Args:
      name: see `DataConfig.source`.
      data_dir: see `DataConfig.data_dir`.

    Returns:
      The source.

    Raises:
      DataError: there is no such source, or its data cannot be downloaded or prepared.
    """
    if name in _OURS:
        builder, note = _OURS[name]
        return Builder(builder(data_dir=folder(data_dir)), name, (note,))
    if name.startswith("tfds:"):
        return _tfds(name, folder(data_dir))
    if name.endswith(SUFFIXES):
        return Files(_local(name))
    raise DataError(
        f"no data source {name!r}.\n  nearest: {', '.join(nearest(name, _OURS, 1))}\n"
        f"There are: {', '.join(_OURS)}; tfds:name/config:version; and files that end in "
        f"{', '.join(SUFFIXES)}, as data/{{split}}.jsonl or train=a.csv,validation=b.csv, or "
        "hub:org/name/{split}.jsonl"
    )


def open_data(config: ExamplesConfig, set_apart: bool = False) -> DataSource:
    """Open the source of a config. `DataError`: see `open_source`.

    With `set_apart`, files without a validation split give up a share of the training examples.
    """
    source = open_source(config.source, config.data_dir)
    if not isinstance(source, Files):
        return source
    train, validation = config.train_split, config.eval_split
    # With any other split the name of the validation split is taken to be mistyped.
    alone = train in source.splits and set(source.splits) <= {train, config.test_split}
    share = config.eval_share if set_apart and alone and train != validation else None
    return _files(source.name, source.stamps, train, validation, share)


@functools.lru_cache(maxsize=4)  # the splits of a run share one source, and read a file once
def _files(name: str, stamps: Any, train: str, validation: str, share: float | None) -> DataSource:
    source = Files(name)
    return source if share is None else SetApart(source, train, validation, share)


_HUB = re.compile(r"hub:(?P<name>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<files>[^=,]+)")


def _local(name: str) -> str:
    """Return the path of files; files of a data set on the hub are downloaded."""
    if not name.startswith("hub:"):
        return name
    if (found := _HUB.fullmatch(name)) is None:
        raise DataError(f"{name!r}: expected hub:organisation/name[@revision]/path/of/file.jsonl")
    require("hub", name)
    import huggingface_hub

    files, how = found["files"], dict[str, Any](repo_type="dataset", revision=found["revision"])
    wanted = [files.replace("{split}", "*")]
    try:
        folder = huggingface_hub.snapshot_download(found["name"], allow_patterns=wanted, **how)
    except (OSError, ValueError) as error:
        raise DataError(f"{name} could not be downloaded:\n  {error}") from error
    return str(Path(folder) / files)


def _tfds(name: str, data_dir: Path) -> DataSource:
    reference = name.removeprefix("tfds:")
    for package in _PACKAGES:
        importlib.import_module(f"tensorflow_datasets.{package}")
    try:
        builder = tfds.builder(reference, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        near = nearest(reference.partition("/")[0].partition(":")[0], known)
        raise DataError(
            f"TFDS {tfds.__version__} has no data set {reference!r}, and none is prepared in "
            f"{data_dir}.\n  nearest: {', '.join(near)}"
        ) from None
    except (ValueError, KeyError, AssertionError) as error:  # an unknown config or version
        raise DataError(f"{name}: {error}") from error
    try:
        return Builder(builder, name)
    except DataError:
        raise
    except Exception as error:
        lacking = "TensorFlow" if _needs_tensorflow(error) else "network"
        raise DataError(
            f"{name}: its data could not be downloaded and prepared:\n"
            f"  {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}\n"
            f"Without {lacking}, prepare it on a machine that has it and copy the "
            f"folder {builder.data_path} here:\n"
            f'  python -c "import tensorflow_datasets as t; t.builder({reference!r}, '
            f"file_format='{FORMAT}').download_and_prepare()\""
        ) from error


def _needs_tensorflow(error: BaseException | None) -> bool:
    """Return whether TFDS's builder itself calls TensorFlow, as some do to read their downloads."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and "tensorflow" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False
