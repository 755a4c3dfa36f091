"""The workload: the model, its data and its loss, as a run takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec

from lora_jax import paths
from lora_jax.data.batches import BatchIterator as BatchIterator
from lora_jax.data.process_slice import Batch as Batch
from lora_jax.data.process_slice import Shard
from lora_jax.errors import LoraError, nearest

Tree = Any  # a pytree


class Loss(NamedTuple):
    """What a loss gives for one batch; a mean is taken once, over everything that was summed.

    total: [] float32, the sum of the losses of the batch's examples or tokens.
    weight: [] float32, how many they are (their summed weights).
    sums: name -> [] float32, other sums over the batch, read by `Workload.scores`.
    """

    total: jax.Array
    weight: jax.Array
    sums: Mapping[str, jax.Array] = {}


def ratios(sums: Mapping[str, float], weight: float) -> dict[str, float]:
    """Each sum over the weight: what accuracy and other means need."""
    return {name: total / max(weight, 1e-9) for name, total in sums.items()}


def examples(batch: Batch) -> int:
    """The length of the leading axis."""
    return len(next(iter(batch.values())))


def check_select(select: str, numbers: Iterable[str]) -> None:
    """Raise `LoraError` unless the number that picks the best adapter is among `numbers`."""
    names = list(numbers)
    if select not in names:
        raise LoraError(
            f"the best adapter is picked by {select!r}, but an evaluation gives {names}; nearest: "
            f"{nearest(select, names, 1)[0]!r}. Set Workload.select (on a command line: --select) "
            "to one of them"
        )


@dataclasses.dataclass(frozen=True)
class Common:
    """What a group of runs over one base has to know of a workload (`lora_jax.groups`).

    A workload that has one depends on nothing in `lora`, `optimizer`, `steps` and `evaluate_every`
    of its config: members that differ in these alone share it, and its data are read once.

    Attributes:
      base: says which parameters `load` reads. Workloads that say the same have the same, but for
        those of `fresh`, and the group loads them once.
      fresh: `fresh()` gives {path: array}, the parameters that are not read but drawn (a new head).
      join: `join(workloads)` is one with room for all of them, of which its own is the first: as
        wide as the widest head. Each parameter of a member is a leading part of its own. None:
        only workloads of the same shapes go together.
      marks: entries that the batches of this workload have when it is joined, for the loss to tell
        what of the outputs is its own: scalars.
    """

    base: str
    fresh: Callable[[], Mapping[str, jax.Array]]
    join: Callable[[Sequence[Workload]], Workload] | None = None
    marks: Mapping[str, np.generic] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its data and its loss. `Config.workload` is a function that builds one.

    Attributes:
      apply: `apply(params, batch, *, train, key) -> outputs`, pure; `key` is None in evaluation.
        `train` is a Python bool. Nothing in it knows of LoRA.
      loss: `loss(outputs, batch) -> Loss`.
      params: the base parameters, or their `jax.ShapeDtypeStruct`s if `load` brings the arrays.
      train: `train(shard)` gives a fresh training iterator, at its first batch, of this process's
        rows of every batch (`shard.take` cuts them out of a whole one). The batches that the
        processes hold together depend on the config alone. Few batch shapes: each is compiled
        once.
      evaluation: split -> `pass_over(shard)`, one pass over it, of this process's rows; the
        batches are as many and as long in every process. "validation" picks the best adapter;
        "test", if there is one, is evaluated at the start and at the end.
      load: `load(shardings)` gives the parameter arrays, called once at the start of the run;
        checked against the shapes. `shardings` is a tree like `params` that says where each is
        to lie. A loader may read by it just what is needed, or pay no heed: what it returns is
        put there.
      example: one whole training batch (of all processes) as `jax.ShapeDtypeStruct`s, for
        `train.py --plan`. None: the first batch is made and looked at.
      placement: rules (pattern, PartitionSpec), exactly one for each parameter, that place it on
        the mesh; or a dict path -> PartitionSpec of some of them, as
        `lora_jax.flax_partitioning.named(nnx_model)` gives it. A parameter without a place there
        has it by Linen's partitioning metadata in `params`, or else by the automatic rule
        (`lora_jax.sharding`).
      trainable: patterns (`lora_jax.paths`) of parameters trained in full (PEFT: modules_to_save).
      scores: `scores(sums, weight) -> name -> number`, from the summed `Loss.sums` of a split.
      select: the evaluation number that picks the best adapter: "loss" or one of the scores.
      better: whether a higher or a lower `select` is better.
      size: how many units a batch holds (padding left out), for the throughput.
      unit: what `size` counts.
      facts: `facts(shard)`: what a reader of the results should know of the data; printed as the
        run starts. One process may ask alone.
      common: how runs of it over one base go together. None: every member of a group loads the
        base, to see that it is the same, and all have the same shapes.
      about: what whoever uses the adapters has to know, JSON values; exported with them.
      floats: of a workload whose weights are quantised as they are loaded, the one before
        (`lora_jax.training.quantised`).
    """

    apply: Callable[..., Any]
    loss: Callable[[Any, Any], Loss]
    params: Tree
    train: Callable[[Shard], BatchIterator]
    evaluation: Mapping[str, Callable[[Shard], Iterable[Batch]]] = dataclasses.field(
        default_factory=dict
    )
    load: Callable[[Tree], Tree] | None = None
    example: Mapping[str, jax.ShapeDtypeStruct] | None = None
    placement: tuple[tuple[str, PartitionSpec], ...] | Mapping[str, PartitionSpec] | None = None
    trainable: tuple[str, ...] = ()
    scores: Callable[[Mapping[str, float], float], dict[str, float]] = ratios
    select: str = "loss"
    better: Literal["lower", "higher"] = "lower"
    size: Callable[[Batch], int] = examples
    unit: str = "examples"
    facts: Callable[[Shard], str] = lambda shard: ""
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    common: Common | None = None
    floats: Workload | None = None

    def arrays(self, shardings: Tree) -> Tree:
        """The parameter arrays where they are to lie: loaded, or those that `params` holds."""
        if self.load is None:
            return jax.device_put(self.params, shardings)
        loaded = self.load(shardings)
        want, got = paths.shapes(self.params), paths.shapes(loaded)
        for path in dict.fromkeys([*want, *got]):
            if want.get(path) != got.get(path):
                raise LoraError(
                    f"Workload.load gave {got.get(path, 'nothing')} for the parameter {path!r}; "
                    f"Workload.params has {want.get(path, 'none of that name')}"
                )
        return jax.device_put(loaded, shardings)
