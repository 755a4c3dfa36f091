"""Replace the file functions of TensorFlow that TFDS calls to unpack and read its downloads.

TFDS opens local files through `tf.io.gfile`, so without TensorFlow it cannot unpack an archive. It
also encodes images that it gets as arrays with `tf.image`. Here Python and Pillow provide these
functions. They replace `tf` in the modules of TFDS concerned while a data set is prepared, and only
if TensorFlow is not installed.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import extractor


class _Module:
    """A module of TensorFlow with some of its members; others raise that TensorFlow is missing."""

    def __init__(self, name: str, **members: Any) -> None:
        self._name = name
        vars(self).update(members)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python itself looks for these
            raise AttributeError(name)
        raise ModuleNotFoundError(
            f"No module named 'tensorflow', whose {self._name}.{name} is called", name="tensorflow"
        )


def _open(path: Any, mode: str = "r") -> Any:
    return open(path, mode, encoding=None if "b" in mode else "utf-8")


def _as_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


GFILE = _Module(
    "tf.io.gfile",
    GFile=_open,
    exists=os.path.exists,
    glob=lambda pattern: sorted(glob.glob(os.fspath(pattern))),
    isdir=os.path.isdir,
    listdir=lambda path: sorted(os.listdir(path)),
    walk=os.walk,
)
TF = _Module(
    "tf",
    compat=_Module("tf.compat", as_text=_as_text),
    io=_Module("tf.io", gfile=GFILE),
)


@contextlib.contextmanager
def stand_in(builder: tfds.core.DatasetBuilder) -> Iterator[None]:
    """Let TFDS prepare a builder's data without TensorFlow, if it only calls file functions."""
    if importlib.util.find_spec("tensorflow") is not None:
        yield
        return
    modules = [extractor, *(sys.modules[kind.__module__] for kind in type(builder).__mro__)]
    with contextlib.ExitStack() as stack:
        for module in modules:
            if "tf" in vars(module):
                stack.enter_context(mock.patch.object(module, "tf", TF))
        for feature in dict(builder.info.features).values():
            if isinstance(feature, tfds.features.Image):
                encode = functools.partial(_encode, feature, feature.encode_example)
                stack.enter_context(mock.patch.object(feature, "encode_example", encode))
        yield


def _encode(feature: tfds.features.Image, encode: Callable[[Any], bytes], image: Any) -> bytes:
    """Encode an image: an array as PNG, which is lossless, and everything else as TFDS does."""
    is_plain = isinstance(image, np.ndarray) and image.dtype == np.uint8
    if not is_plain or feature.encoding_format == "jpeg":
        return encode(image)
    import PIL.Image  # an extra, which few data sets need here

    file = io.BytesIO()
    PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "PNG")
    return file.getvalue()
