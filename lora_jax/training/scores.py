"""Scores of a split, computed from sums over its batches.

Each score is a pair of functions: one computes the sums of a batch (in the loss, on the device),
the other computes the score from the total sums (on the host). The metrics of scikit-learn would
need all outputs and labels at once, on one host.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Sums = Mapping[str, Any]  # name -> a number, or a matrix of numbers


def names(scores: Callable[[Sums, float], dict[str, float]]) -> list[str]:
    """Return the names of the scores of an evaluation.

    >>> names(token_scores)
    ['loss', 'perplexity']
    """
    return ["loss", *scores(defaultdict(float), 0.0)]


def class_sums(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    """Count the examples of each class by what was guessed, [class, guess], and correct guesses."""
    guess, count = jnp.argmax(logits, axis=-1), logits.shape[-1]
    own = jax.nn.one_hot(labels, count) * weights[:, None]
    confusion = own.T @ jax.nn.one_hot(guess, count)
    return {"correct": jnp.trace(confusion), "confusion": confusion}


def accuracy(sums: Sums, weight: float) -> dict[str, float]:
    """Return the share of correct guesses."""
    return {"accuracy": sums["correct"] / max(weight, 1e-9)}


def class_scores(sums: Sums, weight: float) -> dict[str, float]:
    """Return the scores for two classes: accuracy, F1 of class 1, and Matthews' correlation."""
    cells = np.atleast_2d(sums["confusion"])[:2, :2]  # a group's head may be wider
    (tn, fp), (fn, tp) = np.broadcast_to(cells, (2, 2)).tolist()
    spread = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return {
        **accuracy(sums, weight),
        "f1": 2 * tp / max(2 * tp + fp + fn, 1e-9),
        "matthews": (tp * tn - fp * fn) / spread if spread else 0.0,
    }


def real_sums(outputs: jax.Array, labels: jax.Array, weights: jax.Array) -> dict[str, jax.Array]:
    """Return the first and second moments of outputs and labels."""
    x, y = outputs * weights, labels * weights
    return {
        "x": x.sum(),
        "y": y.sum(),
        "xx": (x * outputs).sum(),
        "yy": (y * labels).sum(),
        "xy": (x * labels).sum(),
    }


def real_scores(sums: Sums, weight: float) -> dict[str, float]:
    n = max(weight, 1e-9)
    x, y = sums["x"] / n, sums["y"] / n
    spread = (sums["xx"] / n - x * x) * (sums["yy"] / n - y * y)
    return {"pearson": (sums["xy"] / n - x * y) / math.sqrt(spread) if spread > 0 else 0.0}


def token_scores(sums: Sums, weight: float) -> dict[str, float]:
    """Return the perplexity, exp of the loss per token."""
    return {"perplexity": math.exp(min(sums["nll"] / max(weight, 1e-9), 700.0))}
