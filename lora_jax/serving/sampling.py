"""Choose the next token: the most likely one, or a random one (temperature, top-k, top-p)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.errors import LoraError
from lora_jax.system.checked import Checked, require


@dataclasses.dataclass(frozen=True)
class Sampling(Checked):
    """The choice of the next token.

    Attributes:
      temperature: 0 takes the most likely token. Above 0, the logits are divided by it, and a token
          is sampled.
      top_k: sample only from this many most likely tokens. None: from all.
      top_p: sample only from the fewest most likely tokens that together have this probability,
          among the tokens that top_k leaves. None: from all of these.
      seed: the seed. The samples of a row depend on the seed and on the number of the row.
    """

    _bounds: ClassVar = {"at least 0": ("temperature",), "at least 1": ("top_k",)}

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2^32 - 1")
        if self.temperature == 0 and (self.top_k or self.top_p):
            raise LoraError(
                "top_k and top_p limit the tokens to sample from, but at temperature 0 nothing is "
                "sampled; give a temperature above 0, such as 0.8, or leave them out"
            )

    @property
    def numbers(self) -> dict[str, Any]:
        """The settings of one row of `choose`, as numbers that a compiled program takes."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": np.int32(2**31 - 1 if self.top_k is None else self.top_k),
            "top_p": np.float32(1.0 if self.top_p is None else self.top_p),
            "seed": np.uint32(self.seed),
        }


def choose(how: Mapping[str, Any], logits: Any, rows: Any, steps: Any) -> Any:
    """Choose the next token of each row, [B] int32; -1 if the logits of a row are not all finite.

    `how` are the `Sampling.numbers` of each row, [B]; `logits` are [B, V] float32; `rows`, [B]
    int32, are numbers on which the samples depend, and `steps`, [B] int32, the numbers of the
    tokens in their rows. One compiled program serves all settings, and samples only if a row asks.
    """
    sound = jnp.isfinite(logits).all(axis=-1)  # argmax would return a token even for NaN
    likeliest = jnp.where(sound, jnp.argmax(logits, axis=-1), -1).astype(jnp.int32)
    random = how["temperature"] > 0

    def draw() -> Any:
        warm = logits / jnp.where(random, how["temperature"], 1)[:, None]
        few, nucleus = how["top_k"] < logits.shape[-1], how["top_p"] < 1
        everything = jnp.ones(logits.shape, bool)
        count = lambda: _most_likely(warm, everything.astype(jnp.float32), how["top_k"])  # noqa: E731
        kept = jax.lax.cond(few.any(), count, lambda: everything)
        shares = jax.nn.softmax(jnp.where(kept, warm, -jnp.inf))
        share = lambda: _most_likely(warm, shares, how["top_p"])  # noqa: E731
        kept &= jax.lax.cond(nucleus.any(), share, lambda: everything)

        def one(seed: Any, row: Any, step: Any, logits: Any) -> Any:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), step)
            return jax.random.categorical(key, logits)

        drawn = jax.vmap(one)(how["seed"], rows, steps, jnp.where(kept, warm, -jnp.inf))
        return jnp.where(sound & random, drawn, likeliest).astype(jnp.int32)

    return jax.lax.cond(random.any(), draw, lambda: likeliest)


def _most_likely(logits: Any, weights: Any, wanted: Any) -> Any:
    """Return which tokens are the fewest most likely ones of total weight `wanted`: bool [B, V].

    The smallest logit that is kept is found by bisection in 32 steps: sorting a vocabulary of
    49,152 takes 23 times as long (184 ms against 8 ms for 8 rows on 2 cores). Tokens as likely as
    the last one are kept, too.
    """

    def halve(_: Any, bounds: Any) -> Any:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(weights, where=logits >= middle[:, None], axis=-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bounds = jnp.min(logits, axis=-1), jnp.max(logits, axis=-1)
    return logits >= jax.lax.fori_loop(0, 32, halve, bounds)[0][:, None]


GREEDY = Sampling()
"""Always choose the most likely token."""
