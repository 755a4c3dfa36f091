"""Classify in mixed batches: each example has its own adapter and its own head.

`lora_jax.adapt` runs the base with the stack of adapters. The heads, and other parameters that were
trained in full, are stacked here in the same way, padded with zeros to the widest; each example
selects its own. So one program for each shape of a batch serves all adapters.

Examples of all threads wait together. A batch has the ones of one length that waited longest, and
is filled up to 1, 4, 16, 64, ... rows, so there are few shapes.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from lora_jax import paths
from lora_jax.adapters import Adapter
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.errors import LoraError, listed
from lora_jax.layout import Layout
from lora_jax.multi.stack import Stack, put, select
from lora_jax.paths import Tree
from lora_jax.serving import jsonl
from lora_jax.serving.engine import Engine, Job
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


@dataclasses.dataclass(eq=False, kw_only=True)
class ScoredExample(Job):
    """An example that waits for its scores; the result is (its number, the scores [outputs]).

    length: the length of the batches that it fits in.
    alone: whether it was in a batch that failed, and has its next one for itself.
    """

    row: Any
    length: int
    alone: bool = False


class Classifier(Engine):
    """Computes the scores of examples, each with one of several adapters.

    Attributes:
      unit: the name of the examples, in the plural.
      tasks: id of an adapter -> its task.
      lengths: the lengths of batches, ascending.
    """

    unit: ClassVar[str]
    lengths: Sequence[int] = (0,)

    def __init__(self, served: Served, batch_size: int, slots: int | None = None) -> None:
        """Read the tasks and stack the heads. Nothing is compiled yet."""
        super().__init__()
        self.tasks, self.batch_size = dict(enumerate(map(self.task_of, served.members))), batch_size
        for member, task in zip(served.members, self.tasks.values(), strict=True):
            check_head(member, task.outputs)
        width = max(task.outputs for task in self.tasks.values())
        model = self.prepare_model(served, width)
        self._layout, self._stacked = served.stack(slots)
        self._params, self._width = served.params, width
        self._trainable = self._heads(served.members, self._stacked.size)
        _check_apart(self._layout, self._trainable)
        self._mixed = _mixed(self._layout, model)
        self._incoming, self._waiting = deque[ScoredExample](), list[ScoredExample]()
        self._under_way = deque[tuple[list[ScoredExample], jax.Array]]()

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
        """Return the length of the batches that a row fits in."""
        return 0

    @abc.abstractmethod
    def arrays(self, rows: Sequence[Any]) -> tuple[NDArray[Any], ...]:
        """Return the batch of some rows: the arguments of the model, all with rows as first axis.

        The second axis of the first array is the length of the batch.
        """

    @abc.abstractmethod
    def blank(self, length: int) -> tuple[NDArray[Any], ...]:
        """Return a batch of this length with one row that means nothing, to warm up with."""

    def facts(self, count: int) -> tuple[str, ...]:
        """Return lines for the end: first how many examples were classified, then other facts."""
        return (f"{count:,} {self.unit if count != 1 else self.unit[:-1]}",)

    def add(self, i: int, member: SavedAdapter) -> None:
        task = self.task_of(member)
        check_head(member, task.outputs)
        if task.outputs > self._width or max(task.lengths, default=0) > self.lengths[-1]:
            raise LoraError(
                f"it has {task.outputs} outputs and lengths {task.lengths}; there is room for "
                f"{self._width} outputs and texts of {self.lengths[-1]} tokens"
            )
        if fresh := [path for path in member.trainable if path not in self._trainable]:
            raise LoraError(f"it was trained together with {fresh[0]!r}, and no other one was")
        own = {path: x[0] for path, x in self._heads([member], 1, self._trainable).items()}
        self._stacked = put(self._layout, self._stacked, i, Adapter(*member.adapter[:2]))
        self._trainable = _replaced(self._trainable, own, np.int32(i))
        self.tasks[i] = task

    def submit(self, adapters: Sequence[int], examples: Sequence[Any]) -> list[ScoredExample]:
        """Let examples wait for their scores, the shortest first."""
        rows = enumerate(self.prepare(adapters, examples))
        jobs = [
            ScoredExample(number=i, adapter=adapters[i], row=row, length=self.length_of(row))
            for i, row in rows
        ]
        self._incoming.extend(sorted(jobs, key=lambda job: job.length))
        return jobs

    def busy(self) -> set[int]:
        under_way = [job for batch, _ in self._under_way for job in batch]
        return {job.adapter for job in (*self._incoming, *self._waiting, *under_way)}

    def turn(self) -> None:
        """Start a batch, and take the outputs of an earlier one."""
        while self._incoming:
            self._waiting.append(self._incoming.popleft())
        if self._waiting:
            first = self._waiting[0]
            fit = [job for job in self._waiting if job.length == first.length and not job.alone]
            batch = [first] if first.alone else fit[: self.batch_size]
            taken = {*map(id, batch)}
            self._waiting = [job for job in self._waiting if id(job) not in taken]
            self._try(batch, lambda: self._under_way.append((batch, self._started(batch))))
        if self._under_way and (len(self._under_way) > _AHEAD or not self._waiting):
            batch, outputs = self._under_way.popleft()
            self._try(batch, lambda: self._taken_from(outputs, batch))

    def warm_up(self) -> None:
        for length in self.lengths:
            for rows in self._sizes:
                arrays = tuple(np.repeat(x, rows, axis=0) for x in self.blank(length))
                jax.block_until_ready(self._call(np.zeros(rows, np.int32), arrays))

    @property
    def _sizes(self) -> list[int]:
        """The numbers of rows that batches have."""
        powers = range(self.batch_size.bit_length() // 2 + 1)
        return sorted({min(4**power, self.batch_size) for power in powers} | {self.batch_size})

    def _try(self, batch: list[ScoredExample], work: Callable[[], object]) -> None:
        """Do something for a batch; if it fails, each example is tried alone, to find the cause."""
        try:
            work()
        except BaseException as error:
            for job in batch:
                if job.alone or not isinstance(error, Exception):
                    job.end(error)
                job.alone = True
            self._waiting += [job for job in batch if not job.over]
            if not isinstance(error, Exception):
                raise

    def _started(self, batch: list[ScoredExample]) -> jax.Array:
        """Start a batch, filled with copies of its rows."""
        rows = next(size for size in self._sizes if size >= len(batch))
        copies = [batch[row % len(batch)] for row in range(rows)]
        ids = np.array([job.adapter for job in copies], np.int32)
        return self._call(ids, self.arrays([job.row for job in copies]))

    def _call(self, ids: NDArray[np.int32], batch: tuple[NDArray[Any], ...]) -> jax.Array:
        """Return the outputs [rows, widest]."""
        arguments = (self._params, self._stacked, self._trainable, ids, batch)
        return self._run(batch[0].shape[:2], self._mixed, *arguments)

    def _taken_from(self, outputs: jax.Array, batch: list[ScoredExample]) -> None:
        for job, row in zip(batch, np.asarray(outputs), strict=False):
            job.end((job.number, row[: self.tasks[job.adapter].outputs]))

    def _heads(
        self, members: Sequence[SavedAdapter], slots: int, known: Collection[str] = ()
    ) -> dict[str, jax.Array]:
        """Stack the parameters that any adapter trained in full: `{path: [slots, ...]}`.

        An adapter that did not train a parameter has the base's. Heads are padded to the widest.
        The paths are `known`, or all that a member trained.
        """
        stacked, width, base = {}, self._width, paths.flatten(self._params)
        for path in known or dict.fromkeys(path for member in members for path in member.trainable):
            each: list[Any] = [m.trainable.get(path, base.get(path)) for m in members]
            if without := [m.name for m, x in zip(members, each, strict=True) if x is None]:
                raise LoraError(
                    f"{path!r} was trained by some adapters, and {without[0]!r} lacks it"
                )
            each = [np.asarray(x) for x in each]
            if path.startswith(_HEAD):
                each = [
                    np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in each
                ]
            if len({x.shape for x in each}) > 1:
                shapes = [f"{m.name}: {list(x.shape)}" for m, x in zip(members, each, strict=True)]
                raise LoraError(
                    f"the adapters cannot share a batch: {path!r} has the shapes\n"
                    f"{listed(shapes)}\npredict with one at a time"
                )
            empty = [np.zeros_like(each[0])] * (slots - len(each))
            stacked[path] = jnp.asarray(np.stack([*each, *empty]))  # XLA would compile a program
        return stacked


@functools.partial(jax.jit, donate_argnums=0)
def _replaced(trainable: dict[str, Any], own: dict[str, Any], i: Any) -> dict[str, Any]:
    """Write parameters into the slot `i`."""
    return {path: x.at[i].set(own[path].astype(x.dtype)) for path, x in trainable.items()}


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


def _check_apart(layout: Layout, trainable: Mapping[str, Any]) -> None:
    if both := [target.path for target in layout.targets if target.path in trainable]:
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
    with served.lock:  # until the examples wait, their adapters stay where they are
        ids = [adapter_of(line, served) for line in window]
        used = [(served.slots[i].name, classifier.tasks[i]) for i in ids]
        examples = [
            classifier.example_of(line, task) for line, (_, task) in zip(window, used, strict=True)
        ]
        waiting = classifier.submit(ids, examples)

    def found() -> Iterator[tuple[int, NDArray[np.float32]]]:
        for number, scores in classifier.read(waiting):
            done(window[number].size)
            yield number, scores

    for line, (name, task), scores in zip(window, used, jsonl.in_order(found()), strict=True):
        if not np.isfinite(scores).all():
            raise LineError(
                f"{line.where}: adapter {name!r} gives scores that are not finite: "
                f"{scores[:5].tolist()}"
            )
        yield {**line.value, "adapter": name, **answer_of(task, scores)}


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
