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
from lora_jax.multi.stack import BASE, Stack, select
from lora_jax.multi.stack import put as put_into
from lora_jax.multi.stack import stack as stack_adapters
from lora_jax.paths import Tree
from lora_jax.serving.engine import Engine
from lora_jax.serving.jobs import Prompt, Writing, hand_out, rows_of
from lora_jax.serving.sampling import GREEDY, Sampling, choose
from lora_jax.transform import adapt

_SHORTEST = 16


class Decoder(Engine):
    """A base, and perhaps a stack of adapters, with the compiled programs that generate text.

    Attributes:
      rows: the number of texts that are written at the same time.
      capacity: the largest number of tokens of a prompt and its text together.
      slots: the size of the stack, or of the one that `add` makes.
      speed: the tokens of prompts that were "read" (without padding) and that were "written" by
        decoding steps (all but the first of a text), and the seconds of "reading" and "writing",
        without compilation.
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
        super().__init__()
        self.config, self.slots = config, 8 if stacked is None else stacked.size
        self.rows, self.capacity = rows, min(capacity, config.max_positions)
        self.speed: dict[str, float] = dict.fromkeys(("read", "reading", "written", "writing"), 0)
        self._params, self._model = params, models.DecoderModel(config)
        self._waiting, self._running = deque[Writing](), dict[int, Writing]()
        self._under_way: tuple[Any, dict[int, Writing]] | None = None  # a step not read yet
        self._state: tuple[Any, Any] | None = None  # the cache, and the last token of each row
        self._slot = 0  # which the next step writes
        self._use(layout, stacked)

    def _use(self, layout: Layout | None, stacked: Stack | None) -> None:
        """Take a stack; its programs are not compiled yet."""
        model = self._model

        def read(params: Tree, ids: Any, mask: Any, cache: Any) -> Any:
            return model.apply({"params": params}, ids, cache, mask, last=1, method=model.decode)

        self._layout, self.stacked = layout, stacked
        self._read = _mixed(layout, read)
        self._programs.clear()

    def add(self, i: int, member: SavedAdapter) -> None:
        """Put an adapter into a slot; the first of a decoder makes a stack in its shapes."""
        adapter = Adapter(*member.adapter[:2])
        if self._layout is None:
            self._use(*stack_adapters([adapter], size=self.slots))
        if self._layout is not None and self.stacked is not None:
            self.stacked = put_into(self._layout, self.stacked, i, adapter)

    def put(self, params: Tree, stacked: Stack | None = None) -> None:
        """Go on with other arrays of the same shapes, and free the cache until the next prompt."""
        self._params, self.stacked, self._state = params, stacked, None

    def submit(
        self, prompts: Sequence[Prompt], max_new_tokens: int = 128, sampling: Sampling = GREEDY
    ) -> list[Writing]:
        """Let prompts wait for rows, and return the jobs, whose results are pieces.

        A row gets the same text as if it were alone, and as from the base with its adapter merged
        in: in greedy decoding the same tokens, except for rounding of the logits.
        """
        if max_new_tokens < 1:
            raise LoraError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        size, jobs = 0 if self.stacked is None else self.stacked.size, list[Writing]()
        for number, prompt in enumerate(prompts):
            length, adapter = len(prompt.tokens), prompt.adapter
            if not BASE <= adapter < size:
                raise LoraError(
                    f"prompt {number}: no adapter {adapter}: there are {size}, counted from 0, and "
                    f"{BASE} is the base"
                )
            if not 0 < length < self.capacity:
                raise LoraError(
                    f"prompt {number} has {length} tokens; expected from 1 to {self.capacity - 1}: "
                    f"there is room for {self.capacity}, and at least one is written"
                )
            room = min(self.config.most_tokens(length), self.capacity) - length
            own = Writing(prompt=prompt, number=number, adapter=adapter, sampling=sampling)
            own.limit = min(max_new_tokens, room)
            jobs.append(own)
        self._waiting.extend(jobs)
        return jobs

    def busy(self) -> set[int]:
        jobs = [*self._waiting, *self._running.values()]
        return {job.adapter for job in jobs if not job.over}

    def turn(self) -> None:
        """Give free rows to prompts that wait, start a step, and read the tokens of the one before.

        So the device does not wait for the host. An error is one of all jobs.
        """
        try:
            self._running = {row: job for row, job in self._running.items() if not job.over}
            while self._waiting and len(self._running) < self.rows:
                self._admit()
            live = {row: job for row, job in self._running.items() if job.started < job.limit}
            with self._timed("writing"):
                before = self._under_way
                self._under_way = (self._step(live), live) if live else None
                if before is not None:
                    self.speed["written"] += sum(not job.over for job in before[1].values())
                    hand_out(*before)
        except BaseException as error:
            for job in (*self._waiting, *self._running.values()):
                job.end(error)
            self._waiting.clear()
            self._running, self._under_way, self._state = {}, None, None
            if not isinstance(error, Exception):
                raise

    def warm_up(self) -> None:
        for length in sorted({self._padded(n) for n in range(1, self.capacity)}):
            for count in {1, self.rows}:
                job = Writing(prompt=Prompt([0] * length), adapter=BASE)
                self._prefill({self.rows: job}, count)  # into a row that there is not
        jax.block_until_ready(self._step({}))

    def _admit(self) -> None:
        """Read the prompts that waited longest, as many as there are free rows."""
        free = [row for row in range(self.rows) if row not in self._running]
        count = self.rows if 2 * min(len(free), len(self._waiting)) >= self.rows else 1
        taken = dict[int, Writing]()
        while self._waiting and len(taken) < min(count, len(free)):
            job = self._waiting.popleft()
            if not job.over:
                taken[free[len(taken)]] = job
        if not taken:
            return
        self._running |= taken
        with self._timed("reading"):
            hand_out(self._prefill(taken, count), dict(enumerate(taken.values())))
        self.speed["read"] += sum(len(job.prompt.tokens) for job in taken.values())
        self._running = {row: job for row, job in self._running.items() if not job.over}

    def _prefill(self, jobs: Mapping[int, Writing], count: int) -> Any:
        """Read prompts into their rows of the cache, and return the first tokens, [count]."""
        length = self._padded(max(len(job.prompt.tokens) for job in jobs.values()))
        ids, mask = np.zeros((count, length), np.int32), np.zeros((count, length), bool)
        for row, job in enumerate(jobs.values()):
            size = len(job.prompt.tokens)
            ids[row, length - size :], mask[row, length - size :] = job.prompt.tokens, True
        # Rows without a job go to a place that there is not, and are left out.
        places = np.array([*jobs, *[self.rows] * (count - len(jobs))], np.int32)

        def run(fixed: Any, cache: Any, tokens: Any, rows: Any, batch: Any, slot: Any) -> Any:
            ids, mask, places = batch
            nothing, own = (caches.empty(self.config, count, n) for n in (0, cache.capacity))
            first, new = self._next(fixed, rows, ids, mask, nothing)
            own = caches.written(own, new, 0)
            cache = caches.with_rows(cache, own, places, slot - length)
            return (cache, tokens.at[places].set(first, mode="drop")), first

        rows = dict(enumerate(jobs.values()))
        return self._advance(("prefill", count, length), run, rows, count, (ids, mask, places))

    def _step(self, jobs: Mapping[int, Writing]) -> Any:
        """Start one decoding step, and return the next tokens, [rows], without waiting."""

        def run(fixed: Any, cache: Any, tokens: Any, rows: Any, _: Any, slot: Any) -> Any:
            ids, live = jnp.maximum(tokens, 0)[:, None], rows["live"][:, None]
            chosen, new = self._next(fixed, rows, ids, live, cache)
            return (caches.written(cache, new, slot, after=jnp.maximum(chosen, 0)), chosen), chosen

        tokens = self._advance(("step",), run, jobs, self.rows, ())
        self._slot = (self._slot + 1) % self.capacity
        return tokens

    def _next(self, fixed: Any, rows: Any, ids: Any, mask: Any, cache: Any) -> tuple[Any, Any]:
        """Return the next tokens, and the entries of the tokens that were read."""
        params, stacked = fixed
        logits, new = self._read(params, (stacked, rows["adapter"]), ids, mask, cache)
        return choose(rows, logits[:, -1], rows["row"], rows["step"]), new

    def _advance(
        self,
        key: tuple[Any, ...],
        run: Callable[..., Any],
        jobs: Mapping[int, Writing],
        count: int,
        batch: Any,
    ) -> Any:
        """Run a program, which returns the next state, and return the tokens that it chose.

        The old cache is donated. The old tokens are not: they may not have been read yet.
        """
        if self._state is None:
            cache = caches.empty(self.config, self.rows, self.capacity)
            self._state = cache, jnp.zeros(self.rows, jnp.int32)
        fixed = (self._params, self.stacked)
        arguments = (fixed, *self._state, rows_of(jobs, count), batch, np.int32(self._slot))
        self._state, chosen = self._run(key, run, *arguments, donated=1)
        for job in jobs.values():
            job.started += 1
        return chosen

    def _padded(self, length: int) -> int:
        return min(rounded(length), self.capacity)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        """Count the time of a block, without compilation."""
        began = time.monotonic() - sum(self.compiled.values())
        yield
        self.speed[what] += time.monotonic() - sum(self.compiled.values()) - began


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
