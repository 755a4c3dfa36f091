"""Match the parameters of a model with the stored tensors that they are made of.

The match is strict: a tensor that belongs to no parameter, a parameter without a tensor, and a
different shape are errors that list both sides.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from lora_jax.base import QuantisedMatrix
from lora_jax.errors import WeightsError
from lora_jax.models.bert import Bert, BertClassifier
from lora_jax.models.config import BertConfig, DecoderConfig, StoredConfig, VitConfig
from lora_jax.models.decoder import DecoderClassifier, DecoderModel
from lora_jax.models.vit import Vit, VitClassifier
from lora_jax.models.weights.disk_arrays import Index
from lora_jax.models.weights.tensor_names import TensorName, TensorNames

ParameterTree = dict[str, Any]
LAST = "last"  # the pooling of a decoder's head: the hidden state of the last token
_SHOWN = 40  # a message lists at most this many names, and counts the rest


@dataclasses.dataclass(frozen=True)
class Head:
    """A classification head that is loaded together with the model.

    Attributes:
      pooling: how the head makes one vector of a text: one of `lora_jax.models.bert.POOLINGS`,
        or `LAST` for a decoder.
      num_classes: the number of classes.
    """

    pooling: str
    num_classes: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors of one checkpoint, with the names in a `column` of the table and Hugging Face's
    layout: kernels [out, in], rotary pairs half a head apart.

    `read` reads the part at an index (a slice with start and stop for each axis) of a tensor, in
    any float dtype; nothing else is read from disk if the format allows it. `keep` returns the base
    of a quantised tensor (transposed if the row says so) for a parameter of a dtype, whose arrays
    are `disk_arrays.ArrayOnDisk`, and None for a tensor of floats. `origin` is the file or folder,
    for messages.
    """

    origin: str
    table: TensorNames
    column: Literal["hf", "gguf"]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str, TensorName, Index], np.ndarray]
    keep: Callable[[str, TensorName, np.dtype], QuantisedMatrix | None]


@dataclasses.dataclass
class StoredParameter:
    """A parameter, and the stored tensors that it is made of.

    `shape` is that of one source, in our layout. There are several `sources` if layers, experts or
    both are stacked, the last of the axes `stack` fastest. `hf` are today's names in Hugging Face's
    files, without the prefix.
    """

    path: str
    shape: tuple[int, ...]
    row: TensorName
    sources: list[str]
    hf: list[str]
    stack: tuple[int, ...]

    @property
    def whole(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return (*self.stack, *self.shape)


def classifier(config: StoredConfig, head: Head) -> nn.Module:
    """Return the model of a config with a head; its parameters are `config.root` and `classifier`.

    Args:
      config: the config of the model.
      head: the head.
    """
    if isinstance(config, VitConfig):
        return VitClassifier(config, head.num_classes)
    if isinstance(config, DecoderConfig):
        return DecoderClassifier(config, head.num_classes)
    return BertClassifier(config, head.num_classes, head.pooling)


def shapes(config: StoredConfig, head: Head | None = None) -> ParameterTree:
    """Return the parameters of a model as ShapeDtypeStructs; nothing is allocated.

    Args:
      config: the config of the model.
      head: the classification head, if there is one.
    """
    traced = _shapes(config, head, jax.sharding.get_abstract_mesh())
    return jax.tree.map(lambda x: x, traced)  # the caller may change the dictionaries


@functools.lru_cache(maxsize=32)
def _shapes(config: StoredConfig, head: Head | None, _: object) -> ParameterTree:
    """Trace the model once for each mesh: a run asks for its shapes three times."""
    kinds = {BertConfig: Bert, DecoderConfig: DecoderModel, VitConfig: Vit}
    model: Any = kinds[type(config)](config) if head is None else classifier(config, head)
    example = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    if isinstance(config, VitConfig):
        example = jax.ShapeDtypeStruct((1, *config.image_size, config.channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), example)["params"]


def _check(stored: Stored, leaf: StoredParameter, config: StoredConfig) -> None:
    """Raise unless every tensor of the parameter has the shape that the config says."""
    for name in leaf.sources:
        shape = stored.shapes[name]
        shape = shape[::-1] if leaf.row.transposed else shape
        if shape != leaf.shape:
            raise WeightsError(
                f"{stored.origin}: tensor {name} does not fit parameter {leaf.path}:\n"
                f"  expected {leaf.shape}, as the configuration says\n"
                f"  got      {shape}, in our layout\n"
                f"the configuration: {config}"
            )


def parameters(stored: Stored, config: StoredConfig, head: Head | None) -> list[StoredParameter]:
    """Match stored tensors with parameters, and raise unless every name has its match."""
    raw = _clean_names(stored)
    experts = config.num_experts if isinstance(config, DecoderConfig) else 0
    parts = config.num_layers * max(1, experts)
    if parts > len(raw):  # the numbers are from a file, so check before a list is made of them
        raise WeightsError(
            f"{stored.origin} has {len(raw)} tensors, too few for {config.num_layers} layers"
            f"{f' of {experts} experts' if experts else ''}.\nThe configuration: {config}"
        )
    leaves = _leaves(stored, config, head)
    wanted = {name: leaf.path for leaf in leaves for name in leaf.sources}
    missing = [f"{path} <- {name}" for name, path in wanted.items() if name not in raw]
    unknown = [raw[name] for name in raw if name not in wanted and not stored.table.skips(name)]
    if isinstance(config, DecoderConfig) and config.tied:
        # Some files repeat the embedding under the name of the head that is tied to it.
        unknown = [name for name in unknown if name not in ("lm_head.weight", "output.weight")]
    if missing or unknown:
        raise WeightsError(
            f"{stored.origin} does not fit the configuration.\n"
            f"Parameters with no tensor in the file ({len(missing)}):{_listed(missing)}\n"
            f"Tensors in the file with no parameter ({len(unknown)}):{_listed(unknown)}\n"
            f"The configuration: {config}"
        )
    for leaf in leaves:
        leaf.sources = [raw[name] for name in leaf.sources]
        _check(stored, leaf, config)
    return leaves


def _clean_names(stored: Stored) -> dict[str, str]:
    """Return clean name -> the name in the file."""
    raw: dict[str, str] = {}
    for name in stored.shapes:
        clean = stored.table.clean(name)
        if clean in raw:
            raise WeightsError(f"{stored.origin}: {raw[clean]} and {name} are the same tensor")
        raw[clean] = name
    return raw


def _leaves(stored: Stored, config: StoredConfig, head: Head | None) -> list[StoredParameter]:
    """Return every parameter of the model, with the clean names of its tensors."""
    # Scanned layers are traced as one layer, which is faster than tracing all of them.
    traced = dataclasses.replace(config, scan_layers=True, remat="none")
    left = flatten_dict(shapes(traced, head), sep="/")
    rows = [(f"{config.root}/" if head else "", row) for row in stored.table.rows]
    rows += [("", row) for row in (_rows_of(stored, head.pooling) if head else ())]
    leaves = []
    for before, row in rows:
        stacked_path = before + row.stacked_path
        if stacked_path not in left:
            continue  # a bias, a norm or a head that this config does not have
        shape = left.pop(stacked_path).shape
        layers, experts = config.num_layers if row.layered else 0, tuple[int, ...]()
        if row.of_experts and isinstance(config, DecoderConfig):
            experts = (config.num_experts,)
        one = shape[bool(layers) + len(experts) :]
        if row.first_layer and config.scan_layers:
            raise WeightsError(
                f"{stored.origin}: the first layer of this model has no {row.path}, so its layers "
                "cannot be stacked; load it with scan_layers=False"
            )
        if not layers:
            leaves.append(_leaf(stored, row, stacked_path, one, experts))
        elif config.scan_layers:
            leaves.append(_leaf(stored, row, stacked_path, one, (layers, *experts)))
        else:
            for i in range(row.first_layer, layers):
                path = before + row.path.format(layer=i)
                leaves.append(_leaf(stored, row, path, one, experts, i))
    if left:
        kinds = {BertConfig: "encoder", DecoderConfig: "decoder", VitConfig: "image model"}
        kind = kinds[type(config)]
        raise WeightsError(
            f"{stored.origin} is of another architecture than {kind} {config}: it has no names "
            f"for{_listed(left)}"
        )
    return leaves


def _leaf(
    stored: Stored,
    row: TensorName,
    path: str,
    shape: tuple[int, ...],
    stack: tuple[int, ...],
    layer: int = 0,
) -> StoredParameter:
    """Return the parameter at `path`: of one layer, or of all if its stack begins with layers."""
    axes = [range(size) for size in stack]
    layers = axes.pop(0) if row.layered and len(stack) > row.of_experts else [layer]
    numbers = [(i, j) for i in layers for j in (axes[0] if axes else [0])]
    template = row.hf if stored.column == "hf" else row.gguf
    names, hf = ([x.format(layer=i, expert=j) for i, j in numbers] for x in (template, row.hf))
    return StoredParameter(path, shape, row, names, hf, stack)


def _rows_of(stored: Stored, pooling: str) -> tuple[TensorName, ...]:
    heads = stored.table.heads
    if pooling not in heads:
        raise WeightsError(
            f"{stored.origin} has no head with the pooling {pooling!r}; its architecture has "
            f"{', '.join(heads) or 'none'}"
        )
    return heads[pooling]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "".join(f"\n  {name}" for name in [*names[:_SHOWN], *more]) or " none"


def stored_head(stored: Stored, pooling: str) -> dict[str, np.ndarray]:
    """Return the stored parameters of a head, by path, in our layout.

    A pretrained encoder often has the dense layer of its pooler but no classes; then only that
    layer is returned.
    """
    names = {stored.table.clean(name): name for name in stored.shapes}
    found = {}
    for row in _rows_of(stored, pooling):
        if row.hf in names:
            name = names[row.hf]
            whole = tuple(slice(0, size) for size in stored.shapes[name])
            value = np.asarray(stored.read(name, row, whole), np.float32)
            found[row.path] = value.T if row.transposed else value
    return found
