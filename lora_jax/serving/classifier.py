"""Classify in mixed batches: each example has its own adapter and its own head.

`lora_jax.adapt` runs the base with the stack of adapters. The heads, and other parameters that were
trained in full, are stacked here in the same way, padded with zeros to the widest; each example
selects its own. So one program for each shape of a batch serves all adapters.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from lora_jax import paths
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.errors import LoraError, listed
from lora_jax.layout import Layout
from lora_jax.multi.stack import Stack, select
from lora_jax.paths import Tree
from lora_jax.serving import jsonl
from lora_jax.serving.jsonl import JsonLine, LineError
from lora_jax.serving.served_adapters import BASE_NAME, Served, check_head
from lora_jax.transform import adapt

_HEAD = "classifier/out/"
_AHEAD = 2  # batches that the host prepares while the device computes one


@dataclasses.dataclass(frozen=True)
class ClassifierTask:
    """The task that an adapter was trained for.

    labels: the names of the classes in the order of the outputs; empty for a real number.
    fields: the fields of a line that hold its text, its two texts, or the path of its image.
    lengths: the lengths of batches in tokens, ascending. A text is cut to the last one. Empty for
      images.
    """

    labels: tuple[str, ...]
    fields: tuple[str, ...]
    lengths: tuple[int, ...] = ()

    @property
    def outputs(self) -> int:
        """The number of outputs of its head."""
        return len(self.labels) or 1


def are_all(kind: type[Any], values: Any, least: int = 0) -> bool:
    """Return whether a value is a list of at least so many values of a type."""
    return (
        isinstance(values, list)
        and len(values) >= least
        and all(type(value) is kind for value in values)
    )


class Classifier(abc.ABC):
    """Computes the scores of examples, each with one of several adapters.

    Attributes:
      unit: the name of the examples, in the plural.
      tasks: the tasks of the adapters, in the order of their ids.
      compiled: length of a batch -> seconds that its program took to compile.
    """

    unit: ClassVar[str]

    def __init__(self, served: Served, batch_size: int) -> None:
        """Read the tasks and stack the heads. Nothing is compiled yet."""
        self.tasks, self.batch_size = tuple(map(self.task_of, served.members)), batch_size
        for member, task in zip(served.members, self.tasks, strict=True):
            check_head(member, task.outputs)
        self.compiled = dict[int, float]()
        width = max(task.outputs for task in self.tasks)
        model = self.prepare_model(served, width)
        layout, stacked = served.stack
        trainable = _trainable(served.members, paths.flatten(served.params), width)
        _check_apart(layout, trainable)
        self._arguments = (served.params, stacked, trainable)
        self._run = jax.jit(_mixed(layout, model))
        self._programs: dict[int, Any] = {}
        self._rows: int | None = None

    @staticmethod
    @abc.abstractmethod
    def task_of(member: SavedAdapter) -> ClassifierTask:
        """Return the task in an adapter's notes, which may come from anybody."""

    @abc.abstractmethod
    def prepare_model(self, served: Served, width: int) -> nn.Module:
        """Return a model with a head of `width` outputs, called with the arrays of a batch."""

    @abc.abstractmethod
    def example_of(self, line: JsonLine, task: ClassifierTask) -> Any:
        """Return the text or image of a line."""

    def prepare(self, adapters: Sequence[int], examples: Sequence[Any]) -> list[Any]:
        """Convert examples to rows of batches, whose lengths `length_of` returns."""
        return list(examples)

    def length_of(self, row: Any) -> int:
        """Return the length of a row; rows of similar lengths are put into one batch."""
        return 0

    @abc.abstractmethod
    def arrays(self, rows: Sequence[Any]) -> tuple[NDArray[Any], ...]:
        """Return the batch of some rows: the arguments of the model, all with rows as first axis.

        The second axis of the first array is the length of the batch.
        """

    def facts(self, count: int) -> tuple[str, ...]:
        """Return lines for the end: first how many examples were classified, then other facts."""
        return (f"{count:,} {self.unit if count != 1 else self.unit[:-1]}",)

    def scores(
        self, adapters: Sequence[int], examples: Sequence[Any]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Classify examples, the shortest first: yield (i, outputs [C] of examples[i]).

        Each batch has `batch_size` rows, or fewer if the first call has fewer examples. A batch
        that would be short is filled with copies of its rows.
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
        """Return the outputs [rows, widest]. A compiled program accepts only one shape."""
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
    """Return `run(params, stacked, trainable, ids [B], batch)`, the outputs [B, C] of a batch."""

    def one(params: Tree, own: Mapping[str, jax.Array], batch: Sequence[jax.Array]) -> Any:
        """Return the outputs [1, C] of a batch of one; `own` has the batch axis, too."""
        leaves = {**flatten_dict(params, sep="/"), **{path: x[0] for path, x in own.items()}}
        return model.apply({"params": unflatten_dict(leaves, sep="/")}, *batch)

    adapted = adapt(layout, one)

    def run(params: Tree, stacked: Stack, trainable: Any, ids: Any, batch: Any) -> Any:
        own = {path: x[ids] for path, x in trainable.items()}
        return adapted(params, select(stacked, ids), own, batch)

    return run


def _trainable(
    members: Sequence[SavedAdapter], params: Mapping[str, Any], width: int
) -> dict[str, jax.Array]:
    """Stack the parameters that any adapter trained in full: `{path: [n, ...]}`.

    An adapter that did not train a parameter has the base's. Heads are padded to `width`.
    """
    stacked = {}
    for path in dict.fromkeys(path for member in members for path in member.trainable):
        each: list[Any] = [member.trainable.get(path, params.get(path)) for member in members]
        without = [m.name for m, x in zip(members, each, strict=True) if x is None]
        if without:
            raise LoraError(f"{path!r} was trained by some adapters, and {without[0]!r} lacks it")
        if path.startswith(_HEAD):
            each = [np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in each]
        if len({x.shape for x in each}) > 1:
            shapes = [f"{m.name}: {list(x.shape)}" for m, x in zip(members, each, strict=True)]
            raise LoraError(
                f"the adapters cannot share a batch: {path!r} has the shapes\n{listed(shapes)}\n"
                "predict with one at a time"
            )
        stacked[path] = jnp.asarray(np.stack(each))  # XLA would compile a program
    return stacked


def _check_apart(layout: Layout, trainable: Mapping[str, Any]) -> None:
    both = [target.path for target in layout.targets if target.path in trainable]
    if both:
        raise LoraError(
            f"the adapters cannot share a batch: {both[0]!r} is adapted by one and trained in "
            "full by another; predict with one at a time"
        )


def predict(
    served: Served,
    classifier: Classifier,
    window: Sequence[JsonLine],
    done: Callable[[int], None] = lambda size: None,
) -> Iterator[dict[str, Any]]:
    """Classify lines, and yield the fields of each with its answer, in the order of the lines.

    The lines are sorted by length and put into batches. `done` is called with the size of each
    line when its scores are there, in any order.
    """
    ids = [adapter_of(line, served) for line in window]
    examples = [
        classifier.example_of(line, classifier.tasks[i])
        for line, i in zip(window, ids, strict=True)
    ]

    def found() -> Iterator[tuple[int, NDArray[np.float32]]]:
        for number, scores in classifier.scores(ids, examples):
            done(window[number].size)
            yield number, scores

    for line, i, scores in zip(window, ids, jsonl.in_order(found()), strict=True):
        name = served.names[i]
        if not np.isfinite(scores).all():
            raise LineError(
                f"{line.where}: adapter {name!r} gives scores that are not finite: "
                f"{scores[:5].tolist()}"
            )
        yield {**line.value, "adapter": name, **answer_of(classifier.tasks[i], scores)}


def answer_of(task: ClassifierTask, scores: NDArray[np.float32]) -> dict[str, Any]:
    """Return the fields that are added to a line.

    >>> answer_of(ClassifierTask(("no", "yes"), ("text",), (32,)), np.zeros(2, np.float32))
    {'prediction': 'no', 'probabilities': {'no': 0.5, 'yes': 0.5}}
    >>> answer_of(ClassifierTask((), ("text",), (32,)), np.ones(1, np.float32))
    {'prediction': 1.0}
    """
    if not task.labels:
        return {"prediction": round(float(scores[0]), 6)}
    powers = np.exp((scores - scores.max()).astype(np.float64))
    shares = (powers / powers.sum()).round(6).tolist()
    best = task.labels[int(scores.argmax())]
    return {"prediction": best, "probabilities": dict(zip(task.labels, shares, strict=True))}


def adapter_of(line: JsonLine, served: Served) -> int:
    """Return the id of the adapter that a line names, which must have a head."""
    name = line.get("adapter", str, "")
    if name == BASE_NAME:
        raise LineError(
            f"{line.where}: {name!r} stands for no adapter, and the base has no head to classify "
            f"with. There are:\n{listed(served.names, 10)}"
        )
    return served.id_of(name or None, line.where)
