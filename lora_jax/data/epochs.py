"""Epochs decide which examples are in which batch; a table makes the batches of them."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import grain
import numpy as np
from numpy.typing import NDArray

from lora_jax.data.batches import IN_THREAD, WHOLE, Batches, Facts, ShardBatches, TextFacts
from lora_jax.data.labels import Labels
from lora_jax.data.process_slice import Shard
from lora_jax.data.source import DataSource
from lora_jax.models.text.tokens import TextTruncation, Tokens

ENDLESS = 2**31  # epochs


@dataclasses.dataclass(frozen=True)
class Epochs:
    """The batches of all epochs, each as the numbers of its examples.

    Every epoch has every example exactly once; its last batch may be short.

    sizes: the number of each example's bucket, [n]; examples of one bucket come together.
    seed: the seed of the order. None: every epoch has the order of the data.
    """

    sizes: NDArray[np.int64]
    batch_size: int
    seed: int | None = None
    count: int | None = 1

    @property
    def batches(self) -> int:
        return -(-len(self.sizes) // self.batch_size)

    def __len__(self) -> int:
        return self.batches * (ENDLESS if self.count is None else self.count)

    @functools.cached_property
    def _plans(self) -> Callable[[int], list[NDArray[np.int64]]]:
        """`plan` with a cache of two epochs: threads that read ahead are already in the next."""
        return functools.lru_cache(maxsize=2)(self.plan)

    def at(self, number: int) -> tuple[int, NDArray[np.int64]]:
        """Return the epoch of a batch, and the numbers of its examples."""
        epoch, place = divmod(int(number), self.batches)
        return epoch, self._plans(epoch)[place]

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the numbers of the examples of each batch of an epoch.

        The examples in the epoch's order are sorted stably by bucket and cut into batches, which
        are then shuffled. So all but a few batches have examples of only one bucket.
        """
        order = np.arange(len(self.sizes))
        random = None if self.seed is None else np.random.default_rng((self.seed, epoch))
        if random is not None:
            random.shuffle(order)
        order = order[np.argsort(self.sizes[order], kind="stable")]
        plan = np.split(order, range(self.batch_size, len(order), self.batch_size))
        if random is not None:
            plan = [plan[i] for i in random.permutation(len(plan))]
        return plan

    def filled(
        self, chosen: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the examples in some rows of a batch of `chosen` ones, and their weights [rows]
        float32.

        A short batch is filled with its own examples, starting with the first, at weight 0.
        """
        weights = (np.arange(self.batch_size) < len(chosen))[rows].astype(np.float32)
        return np.resize(chosen, self.batch_size)[rows], weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochTable(abc.ABC):
    """The random-access source of Grain: the rows of a shard of each batch, by its number."""

    epochs: Epochs
    labels: Labels
    shard: Shard = WHOLE

    @abc.abstractmethod
    def columns(
        self, epoch: int, chosen: NDArray[np.int64], rows: NDArray[np.int64]
    ) -> dict[str, NDArray[Any]]:
        """Return the inputs and labels of some examples of the batch that has those `chosen`."""

    def __len__(self) -> int:
        return len(self.epochs)

    def __getitem__(self, number: int) -> dict[str, NDArray[Any]]:
        epoch, chosen = self.epochs.at(number)
        rows, weight = self.epochs.filled(chosen, self.shard.rows(self.epochs.batch_size))
        found = self.columns(epoch, chosen, rows)
        return {**found, "weight": weight, "index": rows.astype(np.int32)}

    def batches(self, facts: Facts, options: grain.ReadOptions = IN_THREAD) -> Batches:
        def part(shard: Shard) -> ShardBatches:
            shard.rows(self.epochs.batch_size)  # raises if the rows cannot be divided
            own = dataclasses.replace(self, shard=shard)
            return grain.MapDataset.source(own).to_iter_dataset(options).__iter__, facts

        return Batches(functools.cache(part), self.labels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenTable(EpochTable):
    """A table of tokenised texts; a batch is padded to the bucket of its longest text.

    sides: the texts of an example in a batch.
    """

    sides: ClassVar[int] = 1

    tokens: Tokens
    buckets: tuple[int, ...]
    pad: int

    def length(self, chosen: NDArray[np.int64]) -> int:
        """Return the number of tokens in a row of a batch."""
        return self.buckets[self.epochs.sizes[chosen].max()]

    def facts(
        self,
        source: DataSource,
        split: str,
        truncation: TextTruncation,
        classes: tuple[tuple[str, int], ...] = (),
    ) -> TextFacts:
        examples, epochs = len(self.epochs.sizes), self.epochs
        tokens = int(self.tokens.lengths.sum()) * self.sides * examples // len(self.tokens)
        places = epochs.batch_size * self.sides * sum(map(self.length, epochs.plan(0)))
        return TextFacts(
            source=source.name,
            split=split,
            examples=examples,
            batches=epochs.batches,
            tokens=tokens,
            padding=1 - tokens / places,
            truncation=truncation,
            classes=classes,
            notes=source.notes,
        )
