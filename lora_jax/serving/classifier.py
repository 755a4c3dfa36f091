"""Score texts in mixed batches: each text by its own adapter and its own head.

The base and the stack of adapters are `lora_jax.adapt`'s business. The heads, and whatever else
was trained beside the adapters, are stacked here likewise, filled up with zeros to the widest;
each example takes its own. So one program for each length of a batch serves all adapters.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from lora_jax import models, paths
from lora_jax.data.tokens import Encoder, TextOrPair, TextTruncation, padding_id
from lora_jax.errors import LoraError, listed
from lora_jax.layout import Layout
from lora_jax.multi.stack import Stack, select
from lora_jax.paths import Tree
from lora_jax.serving.served_adapters import Served, ServedAdapter
from lora_jax.transform import adapt

_HEAD = "classifier/out/"
_AHEAD = 2  # batches that the host prepares while the device is at one


@dataclasses.dataclass(frozen=True)
class ClassifierTask:
    """What an adapter was trained for.

    labels: the names of the classes in the order of the outputs; none for a real number.
    fields: of a line, that hold its text, or the two texts of a pair.
    lengths: of batches in tokens, ascending; a text is cut to the last one.
    """

    labels: tuple[str, ...]
    fields: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def outputs(self) -> int:
        """How many outputs its head has."""
        return len(self.labels) or 1


def task_of(member: ServedAdapter) -> ClassifierTask:
    """What `lora_jax.training.classification` said of the adapter as it was exported.

    Raises:
      LoraError: it said nothing, or nothing that can be used.
    """
    about = member.about
    found: dict[str, Any] = {name: about.get(name) for name in ("labels", "text_fields", "lengths")}
    sound = (
        _all(str, found["labels"])
        and _all(str, found["text_fields"], 1)
        and len(found["text_fields"]) <= 2
        and _all(int, found["lengths"], 1)
        and found["lengths"] == sorted(found["lengths"])
        and found["lengths"][0] > 0
    )
    if not sound:
        raise LoraError(
            f"adapter {member.name!r} ({member.path}) does not say what it classifies: "
            f"{'it has ' + str(found)[:300] if any(found.values()) else 'nothing is said'}.\n"
            "Adapters that train.py exports say it; one that you save yourself says it by "
            'lora_jax.save(..., about={"labels": ["no", "yes"], "text_fields": ["text"], '
            '"lengths": [32, 64], "model": {"reference": ..., "pooling": "mean"}})'
        )
    task = ClassifierTask(*(tuple(found[name]) for name in ("labels", "text_fields", "lengths")))
    kernel = member.base.get(f"{_HEAD}kernel")
    if kernel is None or kernel.shape[-1] != task.outputs:
        raise LoraError(
            f"adapter {member.name!r} ({member.path}) needs a head of {task.outputs} outputs; "
            f"it has {'none' if kernel is None else kernel.shape[-1]}. What was trained beside "
            f"it:\n{listed(member.base)}"
        )
    return task


def _all(kind: type[Any], values: Any, least: int = 0) -> bool:
    return (
        isinstance(values, list)
        and len(values) >= least
        and all(type(value) is kind for value in values)
    )


class Classifier:
    """The scores of texts, by any of several adapters.

    Attributes:
      tasks: of the adapters, in the order of their ids.
      cut: what the length limits of the tasks have cut off so far.
      tokens: how many there were so far, padding left out.
      compiled: length of a batch -> seconds that its program took to compile.
    """

    def __init__(self, served: Served, batch_size: int) -> None:
        """Stack the heads; nothing is compiled yet.

        Raises:
          LoraError: an adapter that is no classifier, or adapters that cannot share a batch.
        """
        self.tasks = tuple(task_of(member) for member in served.members)
        self.batch_size = batch_size
        self.cut, self.tokens, self.compiled = TextTruncation(), 0, dict[int, float]()
        self.lengths = sorted({length for task in self.tasks for length in task.lengths})
        _check_positions(served, self.lengths[-1])
        tokenizer = served.source.tokenizer()
        limits = {task.lengths[-1] for task in self.tasks}
        self._encoders = {limit: Encoder(tokenizer, limit) for limit in limits}
        self._pad = padding_id(tokenizer)
        width = max(task.outputs for task in self.tasks)
        model = models.BertClassifier(served.config, width, _pooling(served.members))
        layout, stacked = served.stack
        trainable = _trainable(served.members, paths.flatten(served.params), width)
        _check_apart(layout, trainable)
        self._arguments = (served.params, stacked, trainable)
        self._run = jax.jit(_mixed(layout, model))
        self._programs: dict[int, Any] = {}
        self._rows: int | None = None

    def scores(
        self, adapters: Sequence[int], texts: Sequence[TextOrPair]
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(i, outputs [C] of texts[i] by its adapter's head), batch by batch, short texts first.

        Each batch holds `batch_size` rows, copies of its own where it would be short; fewer if
        the first call brings fewer texts.
        """
        if self._rows is None:
            self._rows = min(self.batch_size, 1 << (len(texts) - 1).bit_length())
        rows = self._encode(adapters, texts)
        order = sorted(range(len(texts)), key=lambda i: len(rows[i].ids))
        under_way = deque[tuple[list[int], jax.Array]]()
        for start in range(0, len(order), self._rows):
            chosen = order[start : start + self._rows]
            batch = self._batch([rows[i] for i in chosen])
            under_way.append((chosen, self._call(np.array(adapters, np.int32)[chosen], batch)))
            if len(under_way) > _AHEAD:
                yield from self._taken(adapters, *under_way.popleft())
        while under_way:
            yield from self._taken(adapters, *under_way.popleft())

    def _encode(self, adapters: Sequence[int], texts: Sequence[TextOrPair]) -> list[Any]:
        """The tokens of each text, cut to the limit of its adapter's task."""
        limits = [self.tasks[adapter].lengths[-1] for adapter in adapters]
        encoded: list[Any] = [None] * len(texts)
        for limit, encoder in self._encoders.items():
            for pair in (False, True):
                own = [
                    i
                    for i in range(len(texts))
                    if limits[i] == limit and isinstance(texts[i], tuple) == pair
                ]
                found = encoder.truncate([texts[i] for i in own], self.cut) if own else []
                for i, encoding in zip(own, found, strict=True):
                    encoded[i] = encoding
        self.tokens += sum(len(encoding.ids) for encoding in encoded)
        return encoded

    def _batch(self, rows: Sequence[Any]) -> dict[str, NDArray[Any]]:
        """As the training's batches are, in the shortest length that holds the longest row."""
        longest = max(len(row.ids) for row in rows)
        length = next(length for length in self.lengths if length >= longest)
        shape = (self._rows or len(rows), length)
        ids, types = np.full(shape, self._pad, np.int32), np.zeros(shape, np.int32)
        mask = np.zeros(shape, bool)
        for row in range(shape[0]):
            encoding = rows[row % len(rows)]
            size = len(encoding.ids)
            ids[row, :size], types[row, :size] = encoding.ids, encoding.type_ids
            mask[row, :size] = True
        return {"input_ids": ids, "mask": mask, "token_types": types}

    def _call(self, adapters: NDArray[np.int32], batch: Mapping[str, NDArray[Any]]) -> jax.Array:
        """The outputs [rows, widest]; a program that has been compiled takes nothing else."""
        count, length = batch["input_ids"].shape
        arguments = (*self._arguments, np.resize(adapters, count), dict(batch))
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


def _mixed(layout: Layout, model: models.BertClassifier) -> Any:
    """`run(params, stacked, beside, ids [B], batch)`, the outputs [B, C] of a mixed batch."""

    def one(params: Tree, own: Mapping[str, jax.Array], batch: Mapping[str, jax.Array]) -> Any:
        """Outputs [1, C] of a batch of one; `own` has the axis of the batch too."""
        leaves = {**flatten_dict(params, sep="/"), **{path: x[0] for path, x in own.items()}}
        inputs = (batch["input_ids"], batch["mask"], batch["token_types"])
        return model.apply({"params": unflatten_dict(leaves, sep="/")}, *inputs)

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


def _pooling(members: Sequence[ServedAdapter]) -> str:
    """What all heads read."""
    said = {member.name: member.about.get("model", {}).get("pooling", "mean") for member in members}
    for name, pooling in said.items():
        if pooling not in models.bert.POOLINGS:
            raise LoraError(f"adapter {name!r} says model.pooling is {str(pooling)[:80]!r}")
    if len(set(said.values())) > 1:
        lines = listed(f"{name}: {pooling}" for name, pooling in said.items())
        raise LoraError(
            f"the adapters cannot share a batch: their heads pool differently:\n{lines}\n"
            "predict with those of one kind at a time"
        )
    return next(iter(said.values()))


def _check_apart(layout: Layout, trainable: Mapping[str, Any]) -> None:
    both = [target.path for target in layout.targets if target.path in trainable]
    if both:
        raise LoraError(
            f"the adapters cannot share a batch: {both[0]!r} is adapted by one and trained in "
            "full by another; predict with one at a time"
        )


def _check_positions(served: Served, length: int) -> None:
    if length > served.config.max_positions:
        raise LoraError(
            f"an adapter takes texts of {length} tokens, but the base has positions for "
            f"{served.config.max_positions}; is it the base that it was trained on?"
        )
