"""The singular values of updates."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lora_jax.adapters import Adapters
from lora_jax.analysis import matrices
from lora_jax.analysis.as_lora import as_lora
from lora_jax.analysis.matrices import Array
from lora_jax.layout import Layout


class Spectrum(NamedTuple):
    """The spectrum of one target's update `scale * a @ b`.

    Attributes:
      values: its singular values in falling order, [*stack, rank].
      effective_rank: e to the entropy of values / sum(values), [*stack] (Roy and Vetterli, 2007).
        It is r for r equal values, 1 if one value is not zero, and 0 if all are zero.
      energy: the sum of the values' squares, which is ||update||_F^2, [*stack].
    """

    values: Array
    effective_rank: Array
    energy: Array


def spectrum(layout: Layout, adapters: Adapters, params: Any = None) -> dict[str, Spectrum]:
    """Return the spectrum of every update.

    Args:
      layout, adapters: an adapter of any kind that has factors.
      params: the base parameters, for DoRA: its update is the change that merging makes, W' - W.

    Returns:
      `{path: Spectrum}`.

    Raises:
      LoraError: adapters that do not fit the layout or are not finite, or DoRA without parameters.

    >>> import jax.numpy as jnp
    >>> from lora_jax import Factors, Target
    >>> layout = Layout((Target("w", (4, 3), (), (0,), (1,), rank=2, alpha=4.0),))
    >>> found = spectrum(layout, {"w": Factors(jnp.eye(4, 2), jnp.eye(2, 3))})["w"]
    >>> found.values.tolist(), float(found.effective_rank), float(found.energy)
    ([2.0, 2.0], 2.0, 8.0)
    """
    layout, adapters, _ = as_lora(layout, adapters, params=params)
    return {
        t.path: of_values(matrices.update_svd(t, adapters[t.path]).values) for t in layout.targets
    }


def of_values(values: Array) -> Spectrum:
    """Return the spectrum with these singular values, [*stack, rank]."""
    total = values.sum(axis=-1, keepdims=True)
    share = values / np.where(total > 0, total, 1)
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(axis=-1)
    effective = np.where(total[..., 0] > 0, np.exp(entropy), 0.0)
    return Spectrum(values, effective, (values**2).sum(axis=-1))
