"""Generate text with a decoder in mixed batches: each row has its own adapter, or none.

The decoder has a fixed number of rows, and a cache with as many slots for each. A waiting prompt
takes a free row: it is read at once (prefill), while the other rows stay as they are. Then each
call of one compiled step writes a token to every row, and a row is free when its text ends. The
compiled programs depend only on shapes, and there are few shapes:

- prompts are padded on the left to the next of 16, 32, 64, 128, ... tokens;
- one prompt is read alone, or, if half of the rows or more are to be filled, all rows at once.

Other prompts, other adapters of the stack and another sampling use the same programs.

The slots of a row are a ring. Every step writes one slot of all rows, the next one, and overwrites
padding, or what a row that is free has left. So a row may begin at any step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import models
from lora_jax.adapters import Adapter
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.models import cache as caches
from lora_jax.multi.stack import BASE, Stack, put, select, stack
from lora_jax.paths import Tree
from lora_jax.serving.jobs import Job, Piece, Prompt, Rows, hand_out
from lora_jax.serving.sampling import GREEDY, Sampling, choose
from lora_jax.serving.turns import Turns
from lora_jax.transform import adapt

_SHORTEST = 16


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
      rows: the number of texts that are written at the same time.
      capacity: the largest number of tokens of a prompt and its text together.
      stacked: the stack of adapters.
      slots: the size of the stack, or of the one that `add` makes.
      turns: the turns of the threads that wait for texts.
      compiled: key of a program -> seconds that it took to compile.
      speed: counts and times over all calls.
    """

    def __init__(
        self,
        config: models.DecoderConfig,
        params: Tree,
        layout: Layout | None = None,
        stacked: Stack | None = None,
        *,
        rows: int = 8,
        capacity: int = 512,
    ) -> None:
        """Make a decoder. Nothing is compiled yet."""
        self.config, self.slots = config, 8 if stacked is None else stacked.size
        self.rows, self.capacity = rows, min(capacity, config.max_positions)
        self.compiled: dict[tuple[Any, ...], float] = {}
        self.speed, self.turns = Speed(), Turns(self.turn)
        self._params = params
        self._programs: dict[tuple[Any, ...], Any] = {}
        self._waiting, self._running = deque[Job](), dict[int, Job]()
        self._under_way: tuple[Any, dict[int, Job]] | None = None  # a step that is not read yet
        self._state: tuple[Any, Any] | None = None  # the cache, and the last token of each row
        self._slot = 0  # which the next step writes
        model = models.DecoderModel(config)

        def read(params: Tree, ids: Any, mask: Any, cache: Any) -> Any:
            return model.apply({"params": params}, ids, cache, mask, last=1, method=model.decode)

        self._plain = read
        self._use(layout, stacked)

    def _use(self, layout: Layout | None, stacked: Stack | None) -> None:
        """Take a stack; its programs are not compiled yet."""
        self._layout, self.stacked = layout, stacked
        self._read = _mixed(layout, self._plain)
        self._programs.clear()

    def add(self, i: int, member: SavedAdapter) -> None:
        """Put an adapter into the slot `i`, between two turns.

        Nothing is compiled again, but after the first one for a decoder that was made without any:
        a stack is made in its shapes.
        """
        adapter = Adapter(*member.adapter[:2])
        if self._layout is None:
            self._use(*stack([adapter], size=self.slots))
        if self._layout is not None and self.stacked is not None:
            self.stacked = put(self._layout, self.stacked, i, adapter)

    def submit(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 128, sampling: Sampling = GREEDY
    ) -> list[Job]:
        """Let prompts wait for rows, after checking them; whoever reads the jobs takes turns."""
        if max_new_tokens < 1:
            raise LoraError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        size, most = 0 if self.stacked is None else self.stacked.size, self.config.most_tokens
        for number, prompt in enumerate(prompts):
            if not BASE <= prompt.adapter < size:
                raise LoraError(
                    f"prompt {number}: no adapter {prompt.adapter}: there are {size}, counted from "
                    f"0, and {BASE} is the base"
                )
            if not 0 < len(prompt.tokens) < self.capacity:
                raise LoraError(
                    f"prompt {number} has {len(prompt.tokens)} tokens; expected from 1 to "
                    f"{self.capacity - 1}: there is room for {self.capacity}, of which at least "
                    f"one is written. The model has positions for {self.config.max_positions}"
                )
        sizes = [len(prompt.tokens) for prompt in prompts]
        rooms = [min(max_new_tokens, most(n) - n, self.capacity - n) for n in sizes]
        jobs = [
            Job(p, i, room, sampling)
            for i, (p, room) in enumerate(zip(prompts, rooms, strict=True))
        ]
        self._waiting.extend(jobs)
        return jobs

    def busy(self) -> set[int]:
        """Return the numbers of the adapters that unfinished jobs use."""
        jobs = [*self._waiting, *self._running.values()]
        return {job.prompt.adapter for job in jobs if not job.over}

    def turn(self) -> None:
        """Give free rows to prompts that wait, start a step, and read the tokens of the one before.

        So the device does not wait for the host. An error is one of all jobs.
        """
        try:
            self._running = {row: job for row, job in self._running.items() if not job.over}
            while self._waiting and len(self._running) < self.rows:
                self._admit()
            live = {row: job for row, job in self._running.items() if job.started < job.limit}
            with self._timed() as speed:
                before, self._under_way = (
                    self._under_way,
                    (self._step(live), live) if live else None,
                )
                if before is not None:
                    speed.written += sum(not job.over for job in before[1].values())
                    hand_out(*before)
        except BaseException as error:
            for job in (*self._waiting, *self._running.values()):
                job.end(error)
            self._waiting.clear()
            self._running, self._under_way, self._state = {}, None, None
            if not isinstance(error, Exception):
                raise

    def warm_up(self) -> None:
        """Compile all programs. Between two turns, while no row is running."""
        lengths = sorted({self._padded(n) for n in range(1, self.capacity)})
        for count in sorted({1, self.rows}):
            for length in lengths:
                self._prefill([Job(Prompt([0] * length), 0, 1, GREEDY)], [self.rows], count)
        jax.block_until_ready(self._step({}))

    def _admit(self) -> None:
        """Read the prompts that waited longest, as many as there are free rows."""
        free = [row for row in range(self.rows) if row not in self._running]
        count = self.rows if 2 * min(len(free), len(self._waiting)) >= self.rows else 1
        jobs = list[Job]()
        while self._waiting and len(jobs) < min(count, len(free)):
            job = self._waiting.popleft()
            if not job.over:
                jobs.append(job)
        if not jobs:
            return
        taken = dict(zip(free, jobs, strict=False))
        self._running |= taken
        started, before = time.monotonic(), sum(self.compiled.values())
        tokens = self._prefill(jobs, list(taken), count)
        for job in jobs:
            job.started += 1
        self.speed.read += sum(len(job.prompt.tokens) for job in jobs)
        hand_out(tokens, dict(enumerate(jobs)))
        compiling = sum(self.compiled.values()) - before
        self.speed.reading += time.monotonic() - started - compiling
        self._running = {row: job for row, job in self._running.items() if not job.over}

    def _prefill(self, jobs: Sequence[Job], places: Sequence[int], count: int) -> Any:
        """Read prompts into rows of the cache, and return the first tokens, [count]."""
        length = self._padded(max(len(job.prompt.tokens) for job in jobs))
        ids, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
        for row, job in enumerate(jobs):
            size = len(job.prompt.tokens)
            ids[row, length - size :], mask[row, length - size :] = job.prompt.tokens, True

        def run(params: Tree, stacked: Any, state: Any, batch: Any, rows: Rows, at: Any) -> Any:
            (cache, tokens), (places, slot) = state, at
            nothing, own = (caches.empty(self.config, count, n) for n in (0, cache.capacity))
            logits, new = self._read(params, (stacked, rows.adapters), *batch, nothing)
            first = choose(rows.how, logits[:, -1], rows.numbers, rows.steps)
            own = caches.written(own, new, 0)
            cache = caches.with_rows(cache, own, places, slot - batch[0].shape[1])
            return (cache, tokens.at[places].set(first, mode="drop")), first

        # Rows without a job go to a place that there is not, and are left out.
        where = np.array([*places, *[self.rows] * (count - len(places))], np.int32)
        arguments = (ids, mask), Rows.of(dict(enumerate(jobs)), count), (where, self._at)
        return self._advanced(("prefill", count, length), run, *arguments)

    def _step(self, jobs: Mapping[int, Job]) -> Any:
        """Start one decoding step, and return the next tokens, [rows], without waiting."""

        def run(params: Tree, stacked: Any, state: Any, rows: Rows, slot: Any) -> Any:
            cache, tokens = state
            ids, live = jnp.maximum(tokens, 0)[:, None], rows.live[:, None]
            logits, new = self._read(params, (stacked, rows.adapters), ids, live, cache)
            chosen = choose(rows.how, logits[:, -1], rows.numbers, rows.steps)
            return (caches.written(cache, new, slot, after=jnp.maximum(chosen, 0)), chosen), chosen

        tokens = self._advanced(("step",), run, Rows.of(jobs, self.rows), self._at)
        self._slot = (self._slot + 1) % self.capacity
        for job in jobs.values():
            job.started += 1
        return tokens

    @property
    def _at(self) -> np.int32:
        return np.int32(self._slot)

    def _advanced(self, key: tuple[Any, ...], run: Callable[..., Any], *arguments: Any) -> Any:
        """Replace the state by the program of the key, which is compiled once; return its tokens.

        The old cache is donated. The tokens are not: they may not have been read yet.
        """
        if self._state is None:
            cache = caches.empty(self.config, self.rows, self.capacity)
            self._state = cache, jnp.zeros(self.rows, jnp.int32)
        (cache, tokens), fixed = self._state, (self._params, self.stacked)
        if key not in self._programs:
            started = time.monotonic()
            program = jax.jit(lambda p, s, c, t, *rest: run(p, s, (c, t), *rest), donate_argnums=2)
            self._programs[key] = program.lower(*fixed, cache, tokens, *arguments).compile()
            self.compiled[key] = time.monotonic() - started
        self._state, chosen = self._programs[key](*fixed, cache, tokens, *arguments)
        return chosen

    def _padded(self, length: int) -> int:
        return min(rounded(length), self.capacity)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[Speed]:
        """Count the time of a block that writes tokens, without compilation."""
        started, before = time.monotonic(), sum(self.compiled.values())
        yield self.speed
        compiling = sum(self.compiled.values()) - before
        self.speed.writing += time.monotonic() - started - compiling


def stream(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
) -> Iterator[Piece]:
    """Continue prompts: yield a `Piece` for each step and unfinished row, once it is known.

    A row gets the same text as if it were alone, and as from the base with its adapter merged in:
    in greedy decoding the same tokens, except for rounding of the logits. The decoder keeps its
    compiled programs, so use one for all calls.
    """
    jobs = decoder.submit(prompts, max_new_tokens, sampling)
    try:
        yield from read(decoder, jobs)
    finally:
        for job in jobs:
            job.over = True


def read(decoder: Decoder, jobs: Sequence[Job]) -> Iterator[Piece]:
    """Yield the pieces of jobs until all of them are over, and take turns when there are none."""
    left = [*jobs]
    while left:
        decoder.turns.until(lambda: any(job.pieces or job.over for job in left))
        for job in tuple(left):
            last = job.over  # looked at before the pieces are
            while job.pieces:
                if isinstance(piece := job.pieces.popleft(), BaseException):
                    raise piece
                yield piece
            if last:
                left.remove(job)


def rounded(length: int) -> int:
    """Round up to one of 16, 32, 64, 128, ...

    >>> [rounded(n) for n in (1, 16, 17, 33, 100)]
    [16, 16, 32, 64, 128]
    """
    return max(_SHORTEST, 1 << max(0, length - 1).bit_length())


def _mixed(layout: Layout | None, f: Callable[..., Any]) -> Callable[..., Any]:
    """Turn `f(params, *args)` into a function of (params, (stacked, ids), *args)."""
    if layout is None:
        return lambda params, chosen, *args: f(params, *args)
    adapted = adapt(layout, f)
    return lambda params, chosen, *args: adapted(params, select(*chosen), *args)
