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
import time
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
from lora_jax.serving.jsonl import JsonLine, LineError
from lora_jax.serving.served_adapters import BASE_NAME, Served, check_head
from lora_jax.serving.turns import Turns
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


@dataclasses.dataclass(eq=False)
class Scored:
    """An example that waits for its scores.

    row: the example, prepared.
    adapter: the id of its adapter.
    length: the length of the batches that it fits in.
    scores: its scores, [outputs] float32, or an error; None if it still waits.
    alone: whether it was in a batch that failed, and has its next one for itself.
    """

    row: Any
    adapter: int
    length: int
    scores: NDArray[np.float32] | BaseException | None = None
    alone: bool = False


class Classifier(abc.ABC):
    """Computes the scores of examples, each with one of several adapters.

    Attributes:
      unit: the name of the examples, in the plural.
      tasks: id of an adapter -> its task.
      lengths: the lengths of batches, ascending.
      turns: the turns of the threads that wait for scores.
      compiled: (rows, length) of a batch -> seconds that its program took to compile.
    """

    unit: ClassVar[str]
    lengths: Sequence[int] = (0,)

    def __init__(self, served: Served, batch_size: int, slots: int | None = None) -> None:
        """Read the tasks and stack the heads. Nothing is compiled yet."""
        self.tasks = {i: self.task_of(member) for i, member in served.slots.items()}
        for i, member in served.slots.items():
            check_head(member, self.tasks[i].outputs)
        self.batch_size, self.compiled = batch_size, dict[tuple[int, int], float]()
        self.turns = Turns(self.turn)
        self._width = max(task.outputs for task in self.tasks.values())
        model = self.prepare_model(served, self._width)
        self._layout, self._stacked = served.stack(slots)
        self._params, self._flat = served.params, paths.flatten(served.params)
        self._trainable = self._heads(served.members, self._stacked.size)
        _check_apart(self._layout, self._trainable)
        self._run = jax.jit(_mixed(self._layout, model))
        self._programs: dict[tuple[int, int], Any] = {}
        self._incoming, self._waiting = deque[Scored](), list[Scored]()
        self._under_way = deque[tuple[list[Scored], jax.Array]]()

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
        """Put an adapter into the slot `i`, between two turns. Nothing is compiled again."""
        task = self.task_of(member)
        check_head(member, task.outputs)
        room = (self._width, self.lengths[-1])
        if task.outputs > room[0] or max(task.lengths, default=0) > room[1]:
            raise LoraError(
                f"adapter {member.name!r} has {task.outputs} outputs and lengths {task.lengths}; "
                f"there is room for {room[0]} outputs and texts of {room[1]} tokens"
            )
        fresh = [path for path in member.trainable if path not in self._trainable]
        if fresh:
            raise LoraError(
                f"adapter {member.name!r} was trained together with {fresh[0]!r}, and no other "
                "one was"
            )
        own = {path: x[0] for path, x in self._heads([member], 1, self._trainable).items()}
        self._stacked = put(self._layout, self._stacked, i, Adapter(*member.adapter[:2]))
        self._trainable = _replaced(self._trainable, own, np.int32(i))
        self.tasks[i] = task

    def submit(self, adapters: Sequence[int], examples: Sequence[Any]) -> list[Scored]:
        """Let examples wait for their scores, the shortest first; who reads them takes turns."""
        rows = self.prepare(adapters, examples)
        found = [Scored(x, i, self.length_of(x)) for x, i in zip(rows, adapters, strict=True)]
        self._incoming.extend(sorted(found, key=lambda one: one.length))
        return found

    def scores(
        self, adapters: Sequence[int], examples: Sequence[Any]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Classify examples: yield (i, outputs [C] of examples[i]) as they come."""
        return self.read(self.submit(adapters, examples))

    def read(self, found: Sequence[Scored]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (i, scores of found[i]) as they come, and take turns when there are none."""
        left = dict(enumerate(found))
        while left:
            self.turns.until(lambda: any(one.scores is not None for one in left.values()))
            for i, one in tuple(left.items()):
                if isinstance(one.scores, BaseException):
                    raise one.scores
                if one.scores is not None:
                    yield i, left.pop(i).scores

    def busy(self) -> set[int]:
        """Return the ids of the adapters that are still waited for."""
        under_way = [one for batch, _ in self._under_way for one in batch]
        return {one.adapter for one in (*self._incoming, *self._waiting, *under_way)}

    def turn(self) -> None:
        """Start a batch, and take the outputs of an earlier one."""
        while self._incoming:
            self._waiting.append(self._incoming.popleft())
        if self._waiting:
            length, alone = self._waiting[0].length, self._waiting[0].alone
            fit = [one for one in self._waiting if one.length == length and not one.alone]
            batch = self._waiting[:1] if alone else fit[: self.batch_size]
            taken = {*map(id, batch)}
            self._waiting = [one for one in self._waiting if id(one) not in taken]
            self._try(batch, lambda: self._under_way.append((batch, self._started(batch))))
        if self._under_way and (len(self._under_way) > _AHEAD or not self._waiting):
            batch, outputs = self._under_way.popleft()
            self._try(batch, lambda: self._taken(batch, outputs))

    def warm_up(self) -> None:
        """Compile all programs. Between two turns."""
        for length in self.lengths:
            for rows in self._sizes:
                arrays = tuple(np.repeat(x, rows, axis=0) for x in self.blank(length))
                jax.block_until_ready(self._call(np.zeros(rows, np.int32), arrays))

    @property
    def _sizes(self) -> list[int]:
        """The numbers of rows that batches have."""
        powers = range(self.batch_size.bit_length() // 2 + 1)
        return sorted({min(4**power, self.batch_size) for power in powers} | {self.batch_size})

    def _try(self, batch: list[Scored], work: Callable[[], object]) -> None:
        """Do something for a batch; if it fails, each example is tried alone, to find the cause."""
        try:
            work()
        except BaseException as error:
            for one in batch:
                if one.alone or not isinstance(error, Exception):
                    one.scores = error
            self._waiting += [one for one in batch if one.scores is None]
            for one in batch:
                one.alone = True
            if not isinstance(error, Exception):
                raise

    def _started(self, batch: list[Scored]) -> jax.Array:
        """Start a batch, filled with copies of its rows."""
        rows = next(size for size in self._sizes if size >= len(batch))
        ids = np.resize(np.array([one.adapter for one in batch], np.int32), rows)
        copies = [batch[row % len(batch)].row for row in range(rows)]
        return self._call(ids, self.arrays(copies))

    def _call(self, ids: NDArray[np.int32], batch: tuple[NDArray[Any], ...]) -> jax.Array:
        """Return the outputs [rows, widest]. A compiled program accepts only one shape."""
        key = batch[0].shape[:2]
        arguments = (self._params, self._stacked, self._trainable, ids, batch)
        if key not in self._programs:
            start = time.monotonic()
            self._programs[key] = self._run.lower(*arguments).compile()
            self.compiled[key] = time.monotonic() - start
        return self._programs[key](*arguments)

    def _taken(self, batch: list[Scored], outputs: jax.Array) -> None:
        for one, row in zip(batch, np.asarray(outputs), strict=False):
            one.scores = row[: self.tasks[one.adapter].outputs]

    def _heads(
        self, members: Sequence[SavedAdapter], slots: int, known: Collection[str] = ()
    ) -> dict[str, jax.Array]:
        """Stack the parameters that any adapter trained in full: `{path: [slots, ...]}`.

        An adapter that did not train a parameter has the base's. Heads are padded to the widest.
        Without `known`, the paths are those that a member trained.
        """
        stacked, width = {}, self._width
        for path in known or dict.fromkeys(path for member in members for path in member.trainable):
            each: list[Any] = [m.trainable.get(path, self._flat.get(path)) for m in members]
            without = [m.name for m, x in zip(members, each, strict=True) if x is None]
            if without:
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
