"""Choose the next token: the most likely one, or a random one (temperature, top-k, top-p)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import LoraError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The choice of the next token.

    temperature: 0 takes the most likely token. Above 0, the logits are divided by it, and a token
        is sampled.
    top_k: sample only from this many most likely tokens. None: from all.
    top_p: sample only from the fewest most likely tokens that together have this probability, among
        the tokens that top_k leaves. None: from all of these.
    seed: the seed. The samples of a row depend on the seed and on the number of the row.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        _require(
            0 <= self.temperature < float("inf"), "temperature", self.temperature, "at least 0"
        )
        _require(self.top_k is None or self.top_k >= 1, "top_k", self.top_k, "at least 1")
        _require(self.top_p is None or 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "from 0 to 2^32 - 1")
        if self.temperature == 0 and (self.top_k or self.top_p):
            raise LoraError(
                "top_k and top_p limit the tokens to sample from, but at temperature 0 nothing is "
                "sampled; give a temperature above 0, such as 0.8, or leave them out"
            )

    @property
    def form(self) -> tuple[bool, int | None, bool]:
        """The part that a program is compiled for; temperature, top_p and seed are arguments."""
        return self.temperature > 0, self.top_k, self.top_p is not None

    @property
    def numbers(self) -> dict[str, Any]:
        """The part that is an argument of `choose`."""
        return {
            "temperature": jnp.float32(self.temperature),
            "top_p": jnp.float32(1.0 if self.top_p is None else self.top_p),
            "seed": jnp.uint32(self.seed),
        }


def choose(
    form: tuple[bool, int | None, bool], numbers: Any, logits: Any, rows: Any, step: Any
) -> Any:
    """Choose the next token of each row, [B] int32; -1 if the logits of a row are not all finite.

    `form` and `numbers` are of a `Sampling`. `logits` are [B, V] float32; `rows`, [B] int32, are
    numbers on which the samples depend, and `step` is the number of the token in its row.
    """
    random, top_k, nucleus = form
    sound = jnp.isfinite(logits).all(axis=-1)  # argmax would return a token even for NaN
    if not random:
        return jnp.where(sound, jnp.argmax(logits, axis=-1), -1).astype(jnp.int32)

    def draw(logits: Any, row: Any) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(numbers["seed"]), row), step)
        logits = logits / numbers["temperature"]
        tokens = None
        if top_k is not None:
            logits, tokens = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))
        if nucleus:
            logits = jnp.where(_nucleus(logits, numbers["top_p"]), logits, -jnp.inf)
        drawn = jax.random.categorical(key, logits)
        return drawn if tokens is None else tokens[drawn]

    return jnp.where(sound, jax.vmap(draw)(logits, rows), -1).astype(jnp.int32)


def _nucleus(logits: Any, top_p: Any) -> Any:
    """Return which tokens are the fewest most likely ones with total probability `top_p`: bool [V].

    The smallest probability that is kept is found by bisection in 32 steps: sorting a vocabulary of
    49,152 takes 23 times as long (184 ms against 8 ms for 8 rows on 2 cores). Tokens as likely as
    the last one are kept, too.
    """
    weights = jax.nn.softmax(logits)

    def halve(_: Any, bounds: Any) -> Any:
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(weights, where=weights >= middle) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    bounds = (jnp.zeros_like(weights[0]), jnp.max(weights))
    return weights >= jax.lax.fori_loop(0, 32, halve, bounds)[0]


def _require(condition: bool, name: str, got: Any, expected: str) -> None:
    if not condition:
        raise LoraError(f"{name} must be {expected}, got {got!r}")


GREEDY = Sampling()
"""Always choose the most likely token."""
