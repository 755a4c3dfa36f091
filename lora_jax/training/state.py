"""The state of a run: all that a step changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

Trained = dict[str, Any]  # {"adapters": {path: Factors}, "base": {path: array}}


class State(NamedTuple):
    """All that a step changes, and nothing of the frozen base: this is what a checkpoint holds.

    trained: {"adapters": {path: Factors(a, b)}, "base": {path: parameter trained in full}}.
    optimizer: the optax state of `trained`.
    step: [] int32, steps taken, skipped ones included.
    skipped: [] int32, steps whose loss or gradient was not finite.
    key: the PRNG key of the run; step i uses it folded with i.
    """

    trained: Trained
    optimizer: Any
    step: jax.Array
    skipped: jax.Array
    key: jax.Array
