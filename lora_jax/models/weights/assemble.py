"""Read a parameter tree from stored tensors, in blocks that go straight to their devices."""

import abc
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.base import QuantisedMatrix
from lora_jax.errors import WeightsError
from lora_jax.models.config import StoredConfig
from lora_jax.models.weights import disk_arrays
from lora_jax.models.weights.stored import (
    Head,
    ParameterTree,
    Stored,
    StoredParameter,
    parameters,
)
from lora_jax.models.weights.tensor_names import TensorName

_BLOCK = 4 * 1024 * 1024  # numbers that are read at once, and held in addition to the result


class Source(abc.ABC):
    """An opened model. Its config is read; no weight is before `load`.

    Attributes:
      path: the folder or file.
    """

    path: Path

    @property
    @abc.abstractmethod
    def config(self) -> StoredConfig:
        """The config that is stored with the weights."""

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that turns a conversation into a prompt; None if there is none."""
        return self.chat_templates.get("default")

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The chat templates by name: `default`, perhaps `tool_use` and others."""
        return {}

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The special tokens that a chat template may name, such as `eos_token` -> its text."""
        return {}

    @abc.abstractmethod
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Return the tokenizer, without its padding and truncation."""

    @abc.abstractmethod
    def stored(self, config: StoredConfig | None = None) -> Stored:
        """Return the tensors without reading them.

        Args:
          config: the config, which a GGUF file needs for its heads. None: `self.config`.
        """

    def load(
        self,
        config: StoredConfig | None = None,
        *,
        head: Head | None = None,
        shardings: ParameterTree | None = None,
        keep_quantised: bool = False,
    ) -> ParameterTree:
        """Return the parameters of the model.

        Args:
          config: the config. None: `self.config`.
          head: a classification head to load as well; the tree is then {"bert", "classifier"}
            ("vit" or "decoder" for other models).
          shardings: a tree of shardings like the result: this process reads only the parts of its
            own devices, each once. None: everything goes to the default device. A weight that stays
            quantised has one sharding, or a base with a sharding for each of its arrays.
          keep_quantised: whether quantised tensors stay as they are, see `lora_jax.base`.

        Returns:
          The tree of parameters.

        Raises:
          WeightsError: tensors are missing, unknown or have wrong shapes; a parameter has no
            sharding, or one that does not divide it. Nothing is read then.
        """
        config = self.config if config is None else config
        return _assemble(self.stored(config), config, head, shardings, keep_quantised)

    def shapes(
        self, config: StoredConfig | None = None, *, head: Head | None = None
    ) -> ParameterTree:
        """Return the result of `load` with `keep_quantised`, as ShapeDtypeStructs.

        Args:
          config: the config. None: `self.config`.
          head: a classification head, if one is loaded.
        """
        config = self.config if config is None else config
        stored = self.stored(config)
        leaves, dtype = parameters(stored, config, head), np.dtype(config.param_dtype)
        tree: ParameterTree = {x.path: jax.ShapeDtypeStruct(x.whole, dtype) for x in leaves}
        for path, base in _bases(stored, leaves, dtype).items():
            tree[path] = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)
        return unflatten_dict(tree, sep="/")


def _assemble(
    stored: Stored,
    config: StoredConfig,
    head: Head | None,
    shardings: ParameterTree | None,
    keep_quantised: bool,
) -> ParameterTree:
    placed = None if shardings is None else flatten_dict(shardings, sep="/")
    leaves, dtype = parameters(stored, config, head), np.dtype(config.param_dtype)
    bases = _bases(stored, leaves, dtype) if keep_quantised else {}
    places = [_place(leaf, bases.get(leaf.path), placed) for leaf in leaves]
    tree: ParameterTree = {}
    for leaf, place in zip(leaves, places, strict=True):
        if leaf.path in bases:
            tree[leaf.path] = disk_arrays.load_base(bases[leaf.path], place)
        else:
            read = functools.partial(_read, stored, leaf, dtype)
            tree[leaf.path] = disk_arrays.load(leaf.whole, place, read)
    return unflatten_dict(tree, sep="/")


def load_one(
    stored: Stored, parameter: StoredParameter, config: StoredConfig, keep_quantised: bool = False
) -> Any:
    """Load one of `stored.parameters` to the default device."""
    dtype = np.dtype(config.param_dtype)
    bases = _bases(stored, [parameter], dtype) if keep_quantised else {}
    if bases:
        return disk_arrays.load_base(bases[parameter.path], None)
    read = functools.partial(_read, stored, parameter, dtype)
    return disk_arrays.load(parameter.whole, None, read)


def read_slice(
    stored: Stored, parameter: StoredParameter, number: int, config: StoredConfig
) -> np.ndarray:
    """Read the tensor `sources[number]` of a parameter, in our layout."""
    part = disk_arrays.empty(parameter.shape, np.dtype(config.param_dtype))
    whole = tuple(slice(0, size) for size in parameter.shape)
    _copy(stored, parameter.row, parameter.sources[number], whole, part)
    return part


def _bases(
    stored: Stored, leaves: Iterable[StoredParameter], dtype: np.dtype
) -> dict[str, QuantisedMatrix]:
    """Return the parameters that are quantised in the file, by path; their arrays are on disk."""
    found = {}
    for leaf in leaves:
        layers = {name: stored.keep(name, leaf.row, dtype) for name in leaf.sources}
        if any(base is not None for base in layers.values()):
            found[leaf.path] = disk_arrays.stack(layers, leaf.path, leaf.stack)
    return found


def _place(
    leaf: StoredParameter, base: QuantisedMatrix | None, placed: Mapping[str, Any] | None
) -> Any:
    """Return the sharding of a parameter, a base of shardings of its arrays, or None."""
    if placed is None:
        return None
    if leaf.path not in placed:
        raise WeightsError(f"shardings has nothing at {leaf.path}; it has {sorted(placed)}")
    where = placed[leaf.path]
    if isinstance(where, QuantisedMatrix):
        return where
    try:
        where.shard_shape(leaf.whole)
        return where if base is None else disk_arrays.shardings(base, where, leaf.path)
    except ValueError as error:
        raise WeightsError(f"the sharding of {leaf.path}: {error}") from error


def _read(
    stored: Stored, leaf: StoredParameter, dtype: np.dtype, index: disk_arrays.Index
) -> np.ndarray:
    """Read the part of a parameter at `index`, in `dtype`, and no more."""
    part = disk_arrays.empty(tuple(axis.stop - axis.start for axis in index), dtype)
    stack, inner = index[: len(leaf.stack)], index[len(leaf.stack) :]
    where: Any = (*stack, ...)
    numbers = np.arange(len(leaf.sources)).reshape(leaf.stack)[where]
    for place, number in np.ndenumerate(numbers):
        _copy(stored, leaf.row, leaf.sources[number], inner, part[place])
    return part


def _copy(
    stored: Stored, row: TensorName, name: str, index: disk_arrays.Index, into: np.ndarray
) -> None:
    """Fill `into` with the part at `index` of a parameter, from one stored tensor."""
    if row.transposed:
        into, index = into.T, index[::-1]
    rows, inner = index[0], index[1:]
    numbers = math.prod(stored.shapes[name][1:])
    step = max(1, _BLOCK // max(1, numbers))
    for start in range(rows.start, rows.stop, step):
        block = slice(start, min(start + step, rows.stop))
        value = stored.read(name, row, (block, *inner))
        into[start - rows.start : block.stop - rows.start] = value
