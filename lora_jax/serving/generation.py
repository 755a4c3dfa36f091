"""Generate text with a decoder in mixed batches: each row has its own adapter, or none.

All prompts of a batch are read at once (prefill); then each call of one compiled step writes a
token to every row. The compiled programs depend only on shapes, and there are few shapes:

- prompts are padded on the left to the next of 16, 24, 32, 48, 64, 96, 128, 192, ... tokens;
- the cache has room for them and all new tokens, rounded up in the same way, or up to twice as much
  if a step for that size has been compiled before;
- rows are filled up to `batch_size`, or to the next power of two if there are fewer prompts.

Other prompts, other adapters of the stack and another temperature use the same programs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from lora_jax import models
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.models import cache as caches
from lora_jax.multi.stack import BASE, Stack, select
from lora_jax.paths import Tree
from lora_jax.serving.sampling import GREEDY, Sampling, choose
from lora_jax.transform import adapt

_SHORTEST = 16


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue.

    tokens: its tokens, at least one.
    adapter: the number of its adapter (`lora_jax.multi.stack`), or `lora_jax.multi.BASE` for none.
    stop: tokens that end the generated text.
    """

    tokens: Sequence[int]
    adapter: int = BASE
    stop: Collection[int] = ()


class Piece(NamedTuple):
    """The result of one step for one row.

    row: the number of the prompt.
    token: the generated token; None if it was a stop token.
    finish: the reason why the row is finished: "stop" at a stop token, "length" at the largest
        number of tokens that was asked for or that the model has positions for. None: it is not
        finished.
    """

    row: int
    token: int | None
    finish: str | None


@dataclasses.dataclass
class Speed:
    """Counts of tokens and their times so far, without compilation."""

    read: int = 0
    """Tokens of prompts, without padding."""
    reading: float = 0.0
    """Seconds spent on prompts."""
    written: int = 0
    """Tokens that decoding steps wrote to unfinished rows, without the first token of each row,
    which the prefill writes."""
    writing: float = 0.0
    """Seconds spent on decoding steps."""


class Decoder:
    """A base, and perhaps a stack of adapters, with the compiled programs that generate text.

    Attributes:
      compiled: key of a program -> seconds that it took to compile.
      speed: counts and times over all calls.
    """

    def __init__(
        self,
        config: models.DecoderConfig,
        params: Tree,
        layout: Layout | None = None,
        stacked: Stack | None = None,
    ) -> None:
        """Make a decoder. Nothing is compiled yet."""
        self.config = config
        self.compiled: dict[tuple[Any, ...], float] = {}
        self.speed = Speed()
        self._params, self._stacked = params, stacked
        self._programs: dict[tuple[Any, ...], Any] = {}
        model = models.DecoderModel(config)

        def read(params: Tree, ids: Any, mask: Any, cache: Any) -> Any:
            return model.apply({"params": params}, ids, cache, mask, last=1, method=model.decode)

        self._read = _mixed(layout, read)

    def put(self, params: Tree, stacked: Stack | None = None) -> None:
        """Go on with other arrays of the same shapes; nothing is compiled again."""
        self._params, self._stacked = params, stacked

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise `LoraError` unless every prompt can be continued."""
        size = 0 if self._stacked is None else self._stacked.size
        room = self.config.max_positions
        for number, prompt in enumerate(prompts):
            if not BASE <= prompt.adapter < size:
                raise LoraError(
                    f"prompt {number}: no adapter {prompt.adapter}: there are {size}, counted from "
                    f"0, and {BASE} is the base"
                )
            if not 0 < len(prompt.tokens) < room:
                raise LoraError(
                    f"prompt {number} has {len(prompt.tokens)} tokens; expected from 1 to "
                    f"{room - 1}: the model has positions for {room}, and at least one is written"
                )

    def capacity(self, rows: int, need: int, sampling: Sampling) -> int:
        """Return the number of cache slots for a batch that needs at least `need`."""
        known = [
            key[2]
            for key in self.compiled
            if key[:2] == ("step", rows) and key[3] == sampling.form and need <= key[2] <= 2 * need
        ]
        return min(known, default=rounded(need))

    def prefill(self, batch: DecodingBatch, capacity: int, sampling: Sampling) -> tuple[Any, Any]:
        """Return a cache of `capacity` slots with all prompts, and the first tokens, [B]."""

        def run(params: Tree, stacked: Any, batch: Any, numbers: Any) -> Any:
            nothing, cache = (
                caches.empty(self.config, len(batch.rows), slots) for slots in (0, capacity)
            )
            tokens = (batch.ids, batch.ids_mask)
            logits, new = self._read(params, (stacked, batch.adapters), *tokens, nothing)
            cache = caches.written(cache, new, 0)
            return cache, choose(sampling.form, numbers, logits[:, -1], batch.rows, jnp.int32(0))

        key = ("prefill", *batch.ids.shape, capacity, sampling.form)
        program = self._compiled(key, run, (), batch, sampling.numbers)
        started = time.monotonic()
        cache, tokens = program(self._params, self._stacked, batch, sampling.numbers)
        jax.block_until_ready(tokens)
        self.speed.reading += time.monotonic() - started
        return cache, tokens

    def step(
        self,
        batch: DecodingBatch,
        cache: Any,
        tokens: Any,
        slot: int,
        number: int,
        sampling: Sampling,
    ) -> tuple[Any, Any]:
        """Start one decoding step: return the cache and the next tokens, [B], without waiting.

        The cache is donated. `tokens` are the last ones, [B] int32; `slot` is the slot of the
        cache to write to, and `number` the number of the new token in its row.
        """

        def run(
            params: Tree, stacked: Any, cache: Any, tokens: Any, at: Any, who: Any, numbers: Any
        ) -> Any:
            slot, number = at
            adapters, rows = who
            ids, mask = tokens[:, None], jnp.ones((len(rows), 1), bool)
            logits, new = self._read(params, (stacked, adapters), ids, mask, cache)
            chosen = choose(sampling.form, numbers, logits[:, -1], rows, number)
            return caches.written(cache, new, slot, after=chosen), chosen

        at = (np.int32(slot), np.int32(number))
        arguments = (cache, tokens, at, (batch.adapters, batch.rows), sampling.numbers)
        key = ("step", len(batch.rows), cache.capacity, sampling.form)
        return self._compiled(key, run, (2,), *arguments)(self._params, self._stacked, *arguments)

    @contextlib.contextmanager
    def timed(self, tokens: int) -> Iterator[None]:
        """Count the time of a block that writes `tokens` tokens, without compilation."""
        started, before = time.monotonic(), sum(self.compiled.values())
        yield
        compiling = sum(self.compiled.values()) - before
        self.speed.writing += time.monotonic() - started - compiling
        self.speed.written += tokens

    def _compiled(
        self,
        key: tuple[Any, ...],
        run: Callable[..., Any],
        donated: tuple[int, ...],
        *arguments: Any,
    ) -> Any:
        """Return the program of the key; if there is none yet, compile `run`."""
        if key not in self._programs:
            started = time.monotonic()
            lowered = jax.jit(run, donate_argnums=donated).lower(
                self._params, self._stacked, *arguments
            )
            self._programs[key] = lowered.compile()
            self.compiled[key] = time.monotonic() - started
        return self._programs[key]


class DecodingBatch(NamedTuple):
    """Prompts that are read together, padded on the left.

    ids: token ids, [B, T] int32.
    ids_mask: False for padding, [B, T] bool.
    rows: the numbers of the prompts, [B] int32.
    adapters: the numbers of the adapters, [B] int32.
    """

    ids: NDArray[np.int32]
    ids_mask: NDArray[np.bool_]
    rows: NDArray[np.int32]
    adapters: NDArray[np.int32]


def stream(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    batch_size: int = 8,
) -> Iterator[Piece]:
    """Continue prompts: yield a `Piece` for each step and unfinished row, once it is known.

    A row gets the same text as if it were alone, and as from the base with its adapter merged in:
    in greedy decoding the same tokens, except for rounding of the logits. The decoder keeps its
    compiled programs, so use one for all calls. `batch_size` prompts are continued at a time.
    """
    for name, value in {"max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise LoraError(f"{name} must be at least 1, got {value}")
    decoder.check(prompts)
    rows = min(batch_size, 1 << max(0, len(prompts) - 1).bit_length())
    for start in range(0, len(prompts), rows):
        chosen = dict(enumerate(prompts[start : start + rows], start))
        yield from _written(decoder, chosen, rows, max_new_tokens, sampling)


def rounded(length: int) -> int:
    """Round up to one of 16, 24, 32, 48, 64, 96, ...: powers of two and the middles between them.

    >>> [rounded(n) for n in (1, 16, 17, 33, 100)]
    [16, 16, 24, 48, 128]
    """
    power = max(_SHORTEST, 1 << max(0, length - 1).bit_length())
    middle = power * 3 // 4
    return middle if power > _SHORTEST and length <= middle else power


def _mixed(layout: Layout | None, f: Callable[..., Any]) -> Callable[..., Any]:
    """Turn `f(params, *args)` into a function of (params, (stacked, ids), *args)."""
    if layout is None:
        return lambda params, chosen, *args: f(params, *args)
    adapted = adapt(layout, f)
    return lambda params, chosen, *args: adapted(params, select(*chosen), *args)


def _batch(prompts: Mapping[int, Prompt], count: int) -> DecodingBatch:
    """Make the batch of the prompts, filled with copies up to `count` rows."""
    numbers = list(prompts)
    own = [numbers[row % len(numbers)] for row in range(count)]
    length = rounded(max(len(prompt.tokens) for prompt in prompts.values()))
    ids, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
    for row, number in enumerate(own):
        tokens = prompts[number].tokens
        ids[row, length - len(tokens) :] = tokens
        mask[row, length - len(tokens) :] = True
    adapters = [prompts[number].adapter for number in own]
    return DecodingBatch(ids, mask, np.array(own, np.int32), np.array(adapters, np.int32))


def _written(
    decoder: Decoder,
    prompts: Mapping[int, Prompt],
    count: int,
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[Piece]:
    """Generate for one batch until all of its rows are finished.

    The next step is started before a token is read, so that the device does not wait for the host.
    """
    sizes = {i: len(p.tokens) for i, p in prompts.items()}
    most_tokens = decoder.config.most_tokens
    limits = {i: min(max_new_tokens, most_tokens(size) - size) for i, size in sizes.items()}
    most, batch = max(limits.values()), _batch(prompts, count)
    length = batch.ids.shape[1]
    capacity = decoder.capacity(count, length + max_new_tokens, sampling)
    cache, tokens = decoder.prefill(batch, capacity, sampling)
    decoder.speed.read += sum(len(prompt.tokens) for prompt in prompts.values())
    going = dict(enumerate(prompts))  # unfinished row of the batch -> number of the prompt
    for n in range(most):
        with decoder.timed(len(going) if n else 0):
            ahead = tokens
            if n + 1 < most:
                cache, ahead = decoder.step(batch, cache, tokens, length + n, n + 1, sampling)
            now, tokens = np.asarray(tokens), ahead
        for row, number in list(going.items()):
            token, finish = int(now[row]), "length" if n + 1 == limits[number] else None
            if token < 0:
                raise LoraError(
                    f"prompt {number}: adapter {prompts[number].adapter} (counted from 0; {BASE} "
                    "is the base) gives logits that are not finite: its factors, or the base, hold "
                    "NaN or infinity, or are too large"
                )
            if token in prompts[number].stop:
                yield Piece(number, None, "stop")
            else:
                yield Piece(number, token, finish)
                if finish is None:
                    continue
            del going[row]
        if not going:
            return
