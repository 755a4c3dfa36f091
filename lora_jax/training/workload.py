"""The workload: the model, its data and its loss, as a run needs them."""

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
from lora_jax.paths import Tree


class Loss(NamedTuple):
    """The loss of one batch as sums. The mean is taken once, over all batches.

    total: [] float32, the sum of the losses of the batch's examples or tokens.
    weight: [] float32, their number, or the sum of their weights.
    sums: name -> [] float32, other sums over the batch, which `Workload.scores` reads.
    """

    total: jax.Array
    weight: jax.Array
    sums: Mapping[str, jax.Array] = {}


def ratios(sums: Mapping[str, float], weight: float) -> dict[str, float]:
    """Divide each sum by the weight, as accuracy and other means need it."""
    return {name: total / max(weight, 1e-9) for name, total in sums.items()}


def examples(batch: Batch) -> int:
    """Return the number of rows of a batch."""
    return len(next(iter(batch.values())))


def check_select(select: str, numbers: Iterable[str]) -> None:
    """Raise `LoraError` unless the score that picks the best adapter is among `numbers`."""
    names = list(numbers)
    if select not in names:
        raise LoraError(
            f"the best adapter is picked by {select!r}, but an evaluation gives {names}; nearest: "
            f"{nearest(select, names, 1)[0]!r}. Set Workload.select (on a command line: --select) "
            "to one of them"
        )


@dataclasses.dataclass(frozen=True)
class Common:
    """The properties of a workload that a group of runs over one base needs (`lora_jax.sweeps`).

    A workload that has them must not depend on `lora`, `optimizer`, `steps` and `evaluate_every` of
    its config: members that differ only in these share one workload, and its data are read once.

    Attributes:
      base: a text that identifies the parameters that `load` reads. If workloads have equal texts,
        the group loads these parameters once.
      fresh: `fresh()` returns {path: array}, the parameters that are not read but drawn (a new
        head).
      join: `join(workloads)` returns one workload with room for all of them, as wide as the widest
        head. This workload is the first of them. Each parameter of a member is the leading part
        of the joined one. None: only workloads of the same shapes can be joined.
      marks: scalars that are added to the batches of this workload when it is joined, so that the
        loss can tell which outputs belong to it.
    """

    base: str
    fresh: Callable[[], Mapping[str, jax.Array]]
    join: Callable[[Sequence[Workload]], Workload] | None = None
    marks: Mapping[str, np.generic] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model, its data and its loss. `Config.workload` is a function that returns one.

    Attributes:
      apply: `apply(params, batch, *, train, key) -> outputs`, a pure function. `train` is a Python
        bool; `key` is None in evaluation. It knows nothing of LoRA.
      loss: `loss(outputs, batch) -> Loss`.
      reference: `reference(outputs, batch)` returns `batch["reference"]` from the outputs of the
        model as the run begins, in evaluation: with the adapter of --from, or with none. None: the
        loss needs no reference.
      reference_program: a text that decides, with the arrays, what `reference` returns, [B, 2]: the
        values are then kept on disk (`lora_jax.training.reference_cache`). None: they are not.
      params: the base parameters, or their `jax.ShapeDtypeStruct`s if `load` returns the arrays.
      train: `train(shard)` returns a new training iterator, at its first batch, over this process's
        rows of every batch (`shard.take` takes them from a whole batch). The global batches depend
        on the config only. They should have few shapes, because each shape is compiled.
      evaluation: split -> `pass_over(shard)`, which returns one pass over this process's rows of
        the split. Every process has the same number of batches, of the same lengths. "validation"
        picks the best adapter; "test", if there is one, is evaluated at the start and at the end.
      load: `load(shardings)` returns the parameter arrays. It is called once at the start of the
        run, and the shapes are checked. `shardings` is a tree like `params`. A loader may use it to
        read only the parts that are needed, or ignore it: the arrays are moved there in any case.
      example: one whole training batch (of all processes) as `jax.ShapeDtypeStruct`s, for
        `train.py --plan`. None: the first batch is made to see its shapes.
      placement: rules (pattern, PartitionSpec) for the shardings, of which exactly one matches each
        parameter; or a dict path -> PartitionSpec of some parameters, as
        `flax_partitioning.named(nnx_model)` returns it. A parameter that is not in the
        dict is placed by Linen's partitioning metadata in `params`, or else by the automatic rule
        (`lora_jax.sharding`).
      trainable: patterns (`lora_jax.paths`) of parameters trained in full (PEFT: modules_to_save).
      scores: `scores(sums, weight) -> name -> number`, from the summed `Loss.sums` of a split.
      select: the score that picks the best adapter: "loss", or one of the scores.
      better: whether a higher or a lower `select` is better.
      size: counts the units of a batch, without padding, for the throughput.
      unit: the name of the units that `size` counts.
      facts: `facts(shard)` returns a text about the data for readers of the results, printed when
        the run starts. It may be called in one process only.
      common: how several runs can share this workload. None: every member of a group loads the base
        to check that it is the same, and all must have the same shapes.
      about: JSON values that users of the adapters need; exported with the adapters.
      samples: `samples(layout, params, adapters)` returns texts that the model writes, and their
        scores, which join the scores of the validation split (`lora_jax.training.samples`).
      floats: if the weights are quantised while they are loaded, the workload without this
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
    reference: Callable[[Any, Any], jax.Array] | None = None
    samples: Callable[..., Any] | None = None
    reference_program: str | None = None
    floats: Workload | None = None

    def arrays(self, shardings: Tree) -> Tree:
        """Return the parameter arrays, loaded or from `params`, placed as `shardings` says."""
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
