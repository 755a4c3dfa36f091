"""Classify in mixed batches: each example by its own adapter and its own head.

The base and the stack of adapters are `lora_jax.adapt`'s business. The heads, and whatever else
was trained beside the adapters, are stacked here likewise, filled up with zeros to the widest;
each example takes its own. So one program for each shape of a batch serves all adapters.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from lora_jax import paths
from lora_jax.errors import LoraError, listed
from lora_jax.layout import Layout
from lora_jax.multi.stack import Stack, select
from lora_jax.paths import Tree
from lora_jax.serving.jsonl import JsonLine
from lora_jax.serving.served_adapters import Served, ServedAdapter
from lora_jax.transform import adapt

_HEAD = "classifier/out/"
_AHEAD = 2  # batches that the host prepares while the device is at one


@dataclasses.dataclass(frozen=True)
class ClassifierTask:
    """What an adapter was trained for.

    labels: the names of the classes in the order of the outputs; none for a real number.
    fields: of a line, that hold its text, or the two texts of a pair, or the path of its image.
    lengths: of batches in tokens, ascending; a text is cut to the last one. None for images.
    """

    labels: tuple[str, ...]
    fields: tuple[str, ...]
    lengths: tuple[int, ...] = ()

    @property
    def outputs(self) -> int:
        """How many outputs its head has."""
        return len(self.labels) or 1


def check_head(member: ServedAdapter, task: ClassifierTask) -> None:
    """Raise unless the adapter comes with a head of as many outputs as its task has."""
    kernel = member.base.get(f"{_HEAD}kernel")
    if kernel is None or kernel.shape[-1] != task.outputs:
        raise LoraError(
            f"adapter {member.name!r} ({member.path}) needs a head of {task.outputs} outputs; "
            f"it has {'none' if kernel is None else kernel.shape[-1]}. What was trained beside "
            f"it:\n{listed(member.base)}"
        )


class Classifier(abc.ABC):
    """The scores of examples, by any of several adapters.

    Attributes:
      unit: what the examples are, in the plural.
      tasks: of the adapters, in the order of their ids.
      compiled: length of a batch -> seconds that its program took to compile.
    """

    unit: ClassVar[str]

    def __init__(
        self, served: Served, tasks: Sequence[ClassifierTask], model: nn.Module, batch_size: int
    ) -> None:
        """Stack the heads; nothing is compiled yet.

        Args:
          served: the adapters and their base.
          tasks: of the adapters.
          model: with a head as wide as the widest; its arguments are the arrays of a batch.
          batch_size: rows of a batch.

        Raises:
          LoraError: adapters that cannot share a batch.
        """
        self.tasks, self.batch_size = tuple(tasks), batch_size
        self.compiled = dict[int, float]()
        width = max(task.outputs for task in tasks)
        layout, stacked = served.stack
        trainable = _trainable(served.members, paths.flatten(served.params), width)
        _check_apart(layout, trainable)
        self._arguments = (served.params, stacked, trainable)
        self._run = jax.jit(_mixed(layout, model))
        self._programs: dict[int, Any] = {}
        self._rows: int | None = None

    @abc.abstractmethod
    def example_of(self, line: JsonLine, task: ClassifierTask) -> Any:
        """What is classified of a line.

        Raises:
          LineError: it is not there.
        """

    @abc.abstractmethod
    def prepare(self, adapters: Sequence[int], examples: Sequence[Any]) -> list[Any]:
        """Rows of batches to be; a length is told of each by `length_of`."""

    @abc.abstractmethod
    def length_of(self, row: Any) -> int:
        """How much room a row needs; rows of similar lengths come together."""

    @abc.abstractmethod
    def arrays(self, rows: Sequence[Any]) -> tuple[NDArray[Any], ...]:
        """The batch of some rows: the arguments of the model, all with rows as first axis.

        The second axis of the first of them is the length of the batch.
        """

    def facts(self, count: int) -> tuple[str, ...]:
        """Lines for the end: how many examples were classified, then what else to know."""
        return (f"{count:,} {self.unit if count != 1 else self.unit[:-1]}",)

    def scores(
        self, adapters: Sequence[int], examples: Sequence[Any]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(i, outputs [C] of examples[i] by its adapter's head), batch by batch, the short first.

        Each batch holds `batch_size` rows, copies of its own where it would be short; fewer if
        the first call brings fewer examples.
        """
        if self._rows is None:
            self._rows = min(self.batch_size, 1 << (len(examples) - 1).bit_length())
        rows = self.prepare(adapters, examples)
        order = sorted(range(len(rows)), key=lambda i: self.length_of(rows[i]))
        under_way = deque[tuple[list[int], jax.Array]]()
        for start in range(0, len(order), self._rows):
            chosen = order[start : start + self._rows]
            batch = self.arrays([rows[i] for i in np.resize(chosen, self._rows)])
            ids = np.array(adapters, np.int32)[np.resize(chosen, self._rows)]
            under_way.append((chosen, self._call(ids, batch)))
            if len(under_way) > _AHEAD:
                yield from self._taken(adapters, *under_way.popleft())
        while under_way:
            yield from self._taken(adapters, *under_way.popleft())

    def _call(self, ids: NDArray[np.int32], batch: tuple[NDArray[Any], ...]) -> jax.Array:
        """The outputs [rows, widest]; a program that has been compiled takes nothing else."""
        length = batch[0].shape[1]
        arguments = (*self._arguments, ids, batch)
        if length not in self._programs:
            start = time.monotonic()
            self._programs[length] = self._run.lower(*arguments).compile()
            self.compiled[length] = time.monotonic() - start
        return self._programs[length](*arguments)

    def _taken(
        self, adapters: Sequence[int], chosen: list[int], outputs: jax.Array
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        for i, row in zip(chosen, np.asarray(outputs), strict=False):
            yield i, row[: self.tasks[adapters[i]].outputs]


def _mixed(layout: Layout, model: nn.Module) -> Any:
    """`run(params, stacked, beside, ids [B], batch)`, the outputs [B, C] of a mixed batch."""

    def one(params: Tree, own: Mapping[str, jax.Array], batch: Sequence[jax.Array]) -> Any:
        """Outputs [1, C] of a batch of one; `own` has the axis of the batch too."""
        leaves = {**flatten_dict(params, sep="/"), **{path: x[0] for path, x in own.items()}}
        return model.apply({"params": unflatten_dict(leaves, sep="/")}, *batch)

    adapted = adapt(layout, one)

    def run(params: Tree, stacked: Stack, trainable: Any, ids: Any, batch: Any) -> Any:
        own = {path: x[ids] for path, x in trainable.items()}
        return adapted(params, select(stacked, ids), own, batch)

    return run


def _trainable(
    members: Sequence[ServedAdapter], params: Mapping[str, Any], width: int
) -> dict[str, jax.Array]:
    """What any member trained beside its adapter, of every member: `{path: [n, ...]}`.

    One that left a parameter alone has the base's; heads are filled up with zeros to `width`.
    """
    stacked = {}
    for path in dict.fromkeys(path for member in members for path in member.base):
        each: list[Any] = [member.base.get(path, params.get(path)) for member in members]
        without = [m.name for m, x in zip(members, each, strict=True) if x is None]
        if without:
            raise LoraError(f"{path!r} was trained by some adapters, and {without[0]!r} has none")
        if path.startswith(_HEAD):
            each = [jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in each]
        if len({x.shape for x in each}) > 1:
            shapes = [f"{m.name}: {list(x.shape)}" for m, x in zip(members, each, strict=True)]
            raise LoraError(
                f"the adapters cannot share a batch: {path!r} has the shapes\n{listed(shapes)}\n"
                "predict with one at a time"
            )
        stacked[path] = jnp.stack(each)
    return stacked


def _check_apart(layout: Layout, trainable: Mapping[str, Any]) -> None:
    both = [target.path for target in layout.targets if target.path in trainable]
    if both:
        raise LoraError(
            f"the adapters cannot share a batch: {both[0]!r} is adapted by one and trained in "
            "full by another; predict with one at a time"
        )
