"""Stored tensors to a parameter tree: names matched, shapes checked, layers stacked.

It is strict. A tensor that no row claims, a parameter that no tensor fills, a shape that
differs: each is an error that lists both sides.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.bert import Bert, BertClassifier
from lora_jax.models.config import BertConfig, Config, LlamaConfig
from lora_jax.models.llama import Llama
from lora_jax.models.names import Form, Row, Table

Tree = dict[str, Any]
_SHOWN = 40  # names that a message lists before it counts the rest


class WeightsError(ValueError):
    """Stored weights that do not fit the model that was asked for."""


@dataclasses.dataclass(frozen=True)
class Head:
    """A classification head that is to be loaded together with the encoder."""

    pooling: str
    num_classes: int


@dataclasses.dataclass(frozen=True)
class Stored:
    """The tensors of one checkpoint.

    Attributes:
        origin: where they are, for messages.
        table: what they are called.
        column: whose names of the table they bear.
        names: all of them.
        read: one array by name, in Hugging Face's layout (kernels [out, in], rotary pairs half
            a head apart), in any float dtype.
    """

    origin: str
    table: Table
    column: Literal["hf", "gguf"]
    names: tuple[str, ...]
    read: Callable[[str, Row], np.ndarray]


@dataclasses.dataclass
class _Leaf:
    """One parameter to be, and the stored tensors it is made of (several where stacked)."""

    path: str
    shape: tuple[int, ...]
    row: Row
    sources: list[str]
    stacked: bool


def shapes(config: Config, head: Head | None = None) -> Tree:
    """The parameters of the model of `config` as ShapeDtypeStructs; nothing is allocated."""
    model: Bert | BertClassifier | Llama
    if isinstance(config, LlamaConfig):
        if head is not None:
            raise WeightsError(f"a classification head is for encoders; got {head} for {config}")
        model = Llama(config)
    elif head is None:
        model = Bert(config)
    else:
        model = BertClassifier(config, head.num_classes, head.pooling)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids)["params"]


def flatten(tree: Tree, before: str = "") -> dict[str, Any]:
    """A nested dict as a flat one of `a/b/c` paths."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = before + name
        found |= flatten(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return found


def assemble(
    stored: Stored, config: Config, head: Head | None = None, shardings: Tree | None = None
) -> Tree:
    """The parameters of the model of `config`, read one tensor at a time.

    Args:
        head: the classification head to load too; the tree is then {"bert", "classifier"}.
        shardings: a tree of shardings like the result; each array goes to its devices as soon
            as it is read. None puts everything on the default device.

    Raises:
        WeightsError: missing, unknown or misshapen tensors.
    """
    placed = flatten(shardings or {})
    tree: Tree = {}
    for leaf in _plan(stored, config, head):
        array = _read(stored, leaf, config)
        if shardings is None:
            value = jnp.asarray(array)
        elif leaf.path not in placed:
            raise WeightsError(f"shardings has nothing at {leaf.path}; it has {sorted(placed)}")
        else:
            # Every process has the whole file and fills the shards of its own devices.
            where = placed[leaf.path]
            value = jax.make_array_from_callback(array.shape, where, array.__getitem__)
        *folders, name = leaf.path.split("/")
        branch = tree
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = value
    return tree


def _read(stored: Stored, leaf: _Leaf, config: Config) -> np.ndarray:
    """The array of one parameter in `config.param_dtype`."""
    shape = (len(leaf.sources), *leaf.shape) if leaf.stacked else leaf.shape
    array = np.empty(shape, np.dtype(config.param_dtype))
    for index, name in enumerate(leaf.sources):
        value = stored.read(name, leaf.row)
        value = value.T if leaf.row.form is Form.TRANSPOSED else value
        if value.shape != leaf.shape:
            raise WeightsError(
                f"{stored.origin}: tensor {name} does not fit parameter {leaf.path}:\n"
                f"  expected {leaf.shape}, as the configuration says\n"
                f"  got      {value.shape}, in our layout\n"
                f"the configuration: {config}"
            )
        array[index if leaf.stacked else ...] = value
    return array


def _plan(stored: Stored, config: Config, head: Head | None) -> list[_Leaf]:
    """Which stored tensors make which parameter; every name of both sides is accounted for."""
    raw = _clean_names(stored)
    leaves = _leaves(stored, config, head)
    wanted = {name: leaf.path for leaf in leaves for name in leaf.sources}
    missing = [f"{path} <- {name}" for name, path in wanted.items() if name not in raw]
    unknown = [raw[name] for name in raw if name not in wanted and not stored.table.skips(name)]
    if isinstance(config, LlamaConfig) and config.tied:
        # Some files repeat the embedding under the name of the head that is tied to it.
        unknown = [name for name in unknown if name != "lm_head.weight"]
    if missing or unknown:
        raise WeightsError(
            f"{stored.origin} does not fit the configuration.\n"
            f"Parameters with no tensor in the file ({len(missing)}):{_listed(missing)}\n"
            f"Tensors in the file with no parameter ({len(unknown)}):{_listed(unknown)}\n"
            f"The configuration: {config}"
        )
    for leaf in leaves:
        leaf.sources = [raw[name] for name in leaf.sources]
    return leaves


def _clean_names(stored: Stored) -> dict[str, str]:
    """Clean name -> the name in the file."""
    raw: dict[str, str] = {}
    for name in stored.names:
        clean = stored.table.clean(name)
        if clean in raw:
            raise WeightsError(f"{stored.origin}: {raw[clean]} and {name} are the same tensor")
        raw[clean] = name
    return raw


def _leaves(stored: Stored, config: Config, head: Head | None) -> list[_Leaf]:
    """Every parameter of the model, with the clean names of what it is made of."""
    # Traced with scanned layers: one layer, not all of them.
    traced = dataclasses.replace(config, scan_layers=True, remat="none")
    left = flatten(shapes(traced, head))
    rows = [("bert/" if head else "", row) for row in stored.table.rows]
    rows += [("", row) for row in (stored.table.heads[head.pooling] if head else ())]
    leaves = []
    for before, row in rows:
        stacked_path = before + row.stacked_path
        if stacked_path not in left:
            continue  # a bias, a norm or a head that this configuration does not have
        shape = left.pop(stacked_path).shape
        name = row.hf if stored.column == "hf" else row.gguf
        if not row.layered:
            leaves.append(_Leaf(stacked_path, shape, row, [name], False))
            continue
        names = [name.format(layer=layer) for layer in range(config.num_layers)]
        if config.scan_layers:
            leaves.append(_Leaf(stacked_path, shape[1:], row, names, True))
            continue
        for layer, one in enumerate(names):
            path = before + row.path.format(layer=layer)
            leaves.append(_Leaf(path, shape[1:], row, [one], False))
    if left:
        kind = "encoder" if isinstance(config, BertConfig) else "decoder"
        raise WeightsError(
            f"{stored.origin} is of another architecture than {kind} {config}: it has no names "
            f"for{_listed(left)}"
        )
    return leaves


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return "".join(f"\n  {name}" for name in [*names[:_SHOWN], *more]) or " none"
