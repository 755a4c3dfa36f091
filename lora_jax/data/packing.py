"""Packed batches from streams: row j of every batch comes from stream j.

The examples of a split are divided into as many streams as a batch has rows. A stream has its own
order and packs its own examples, so the batches do not depend on which process has which streams,
and a process reads only the examples of its own streams.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import grain
import numpy as np
from grain import experimental
from numpy.typing import NDArray

from lora_jax.data.batches import IN_THREAD
from lora_jax.data.epochs import ENDLESS
from lora_jax.data.process_slice import Shard
from lora_jax.errors import DataError
from lora_jax.models.text.tokens import TokenRow

_Arrays = dict[str, NDArray[Any]]  # a packed row, or a batch of rows
_BINS = 32  # rows that are filled at the same time
_SAMPLE = 8  # the padding of endless streams is estimated from _SAMPLE * _BINS rows


@dataclasses.dataclass(frozen=True)
class Packing:
    """The settings by which streams become batches."""

    batch_size: int
    """Rows of a batch, and number of streams."""
    length: int
    """Positions of a row."""
    pad: int
    """The token id of padding."""
    seed: int | None
    """Seed of the orders. None: the order of the data."""
    epochs: int | None
    """The number of epochs of a stream. None: without end."""
    together: bool = True
    """Whether a row holds as many examples as fit, or only one."""

    def blank(self) -> _Arrays:
        """Return a row of padding, whose loss weights are 0."""
        names = ("input_ids", "targets", "segment_ids", "positions")
        row: _Arrays = {name: np.zeros(self.length, np.int32) for name in names}
        row["input_ids"] += self.pad
        row["targets"] += self.pad
        return row | {"loss_weight": np.zeros(self.length, np.float32)}

    def pack(self, number: int, rows: Sequence[TokenRow]) -> grain.IterDataset:
        """Pack stream `number` by best fit, with several rows that are filled at the same time."""
        seed = None if self.seed is None else (self.seed, number)
        stream = Stream(rows, seed, ENDLESS if self.epochs is None else self.epochs)
        dataset = grain.MapDataset.source(stream).to_iter_dataset(IN_THREAD)
        if not self.together:
            return dataset.map(self._alone)
        packed = experimental.BestFitPackIterDataset(
            dataset,
            length_struct=dict.fromkeys(("input_ids", "targets", "loss_weight"), self.length),
            num_packing_bins=_BINS,
            # The last of these rows are the emptiest. All streams have the same number of them, so
            # without shuffling the last rows of all streams would come together in one batch.
            shuffle_bins=seed is not None,
            seed=0 if seed is None else int(np.random.SeedSequence(seed).generate_state(1)[0]),
            padding_struct={"input_ids": self.pad, "targets": self.pad, "loss_weight": 0},
        )
        return packed.map(_named)

    def _alone(self, row: _Arrays) -> _Arrays:
        """Return a row that holds one example."""
        size, whole = len(row["input_ids"]), self.blank()
        own = {"segment_ids": np.int32(1), "positions": np.arange(size, dtype=np.int32)}
        for name, values in (row | own).items():
            whole[name][:size] = values
        return whole


def _named(row: _Arrays) -> _Arrays:
    names = {"segment_ids": "input_ids_segment_ids", "positions": "input_ids_positions"}
    names |= {name: name for name in ("input_ids", "targets", "loss_weight")}
    return {name: row[key] for name, key in names.items()}


@dataclasses.dataclass(frozen=True)
class Stream(Sequence[_Arrays | None]):
    """The random-access source of Grain: the rows of every epoch as inputs, targets and weights.

    Grain skips a None. Its own shuffle takes a millisecond a row if there are few rows.
    """

    rows: Sequence[TokenRow]
    seed: tuple[int, ...] | None
    epochs: int

    def __len__(self) -> int:
        return len(self.rows) * self.epochs

    def __getitem__(self, index: int) -> _Arrays | None:  # type: ignore[override]
        epoch, place = divmod(int(index), len(self.rows))
        ids, marks = self.rows[int(self._orders(epoch)[place])]
        if len(ids) == 0:
            return None
        return {
            "input_ids": ids[:-1],
            "targets": ids[1:],
            "loss_weight": marks[1:].astype(np.float32),
        }

    @functools.cached_property
    def _orders(self) -> Callable[[int], Sequence[int] | NDArray[np.int64]]:
        """`_order` with a cache of the current epoch."""
        return functools.lru_cache(maxsize=1)(self._order)

    def _order(self, epoch: int) -> Sequence[int] | NDArray[np.int64]:
        if self.seed is None:
            return range(len(self.rows))
        return np.random.default_rng((*self.seed, epoch)).permutation(len(self.rows))


class Streams:
    """The streams of one process."""

    def __init__(
        self, rows: Mapping[int, Sequence[TokenRow]], packing: Packing, shard: Shard, where: str
    ) -> None:
        """Make the streams, by number; nothing is packed yet. An empty row is skipped."""
        self._packing, self._shard, self._where = packing, shard, where
        # Grain would search for ever for the next row of an endless stream that has none.
        self._rows = {n: r if any(len(ids) for ids, _ in r) else () for n, r in rows.items()}

    def begin(self) -> PackedBatches:
        """Return an iterator before the first batch. Every process must call this, or all wait."""
        if not self._anything:
            raise DataError(f"{self._where}: no example of it has anything to learn")
        return PackedBatches(self._iterators(), self._packing.blank(), self._batches)

    @functools.cached_property
    def _anything(self) -> bool:
        return self._shard.most(sum(map(len, self._rows.values()))) > 0

    @functools.cached_property
    def _batches(self) -> int | None:
        return None if self._packing.epochs is None else self._shard.most(self.longest)

    @functools.cached_property
    def longest(self) -> int:
        """The number of rows of the longest stream here; only for streams with an end.

        To count them, the streams must be packed, which takes as long as a pass over the batches.
        """
        assert self._packing.epochs is not None
        return max(sum(1 for _ in rows) for rows in self._iterators().values())

    def fill(self) -> float:
        """Return the share of positions in use in endless streams, estimated from a sample."""
        used = [item for item in self._rows.items() if item[1]]
        if not used:
            return 0.0
        some = used[:: -(-len(used) // _SAMPLE)]
        each = _BINS * -(-_SAMPLE // len(some))
        rows = chain.from_iterable(islice(self._packing.pack(*item), each) for item in some)
        full = np.mean([np.mean(row["segment_ids"] > 0) for row in rows])
        return float(full) * len(used) / len(self._rows)

    def _iterators(self) -> dict[int, grain.DatasetIterator]:
        return {n: iter(self._packing.pack(n, rows)) for n, rows in self._rows.items()}


class PackedBatches:
    """An iterator over batches from streams (`lora_jax.data.batches.BatchIterator`)."""

    def __init__(
        self, streams: Mapping[int, grain.DatasetIterator], blank: _Arrays, total: int | None
    ) -> None:
        """Start before the first of `total` batches (None: without end); `blank` fills up streams
        that have ended."""
        self._streams, self._blank, self._total = streams, blank, total
        self._batch = 0

    def __iter__(self) -> Iterator[_Arrays]:
        return self

    def __next__(self) -> _Arrays:
        if self._batch == self._total:
            raise StopIteration
        self._batch += 1
        rows = [next(stream, self._blank) for stream in self._streams.values()]
        return {name: np.stack([row[name] for row in rows]) for name in self._blank}

    def get_state(self) -> dict[str, Any]:
        """Return the number of batches so far, and the state of each stream."""
        rows = {str(number): stream.get_state() for number, stream in self._streams.items()}
        return {"batch": self._batch, "rows": rows}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at the position that `get_state` returned."""
        missing = [n for n in self._streams if str(n) not in state["rows"]]
        if missing:
            raise DataError(
                f"the saved state of the data lacks rows {missing} of a batch; it has "
                f"{len(state['rows'])} rows.\nUse the batch size of the run that saved it."
            )
        self._batch = state["batch"]
        for number, stream in self._streams.items():
            stream.set_state(state["rows"][str(number)])
