"""The state of a run: everything that a step changes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

Trained = dict[str, Any]  # {"adapters": {path: Factors}, "base": {path: array}}


class State(NamedTuple):
    """Everything that a step changes, without the frozen base. A checkpoint holds these arrays.

    trained: {"adapters": {path: Factors(a, b)}, "base": {path: parameter trained in full}}.
    step: [] int32, the number of steps taken, including skipped ones.
    skipped: [] int32, the number of steps whose loss or gradient was not finite.
    key: the PRNG key of the run; step i uses it folded with i.
    """

    trained: Trained
    optimizer: Any
    step: jax.Array
    skipped: jax.Array
    key: jax.Array
