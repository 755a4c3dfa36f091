"""Adapter dropout: any adapters, with some of the inputs of their updates set to zero."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.multi.selected import Around
from lora_jax.spec import Target
from lora_jax.transform import UpdateOf
from lora_jax.updates.dropped import Dropped
from lora_jax.updates.named import Names
from lora_jax.updates.update import Update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout(Around):
    """Adapters and the dropout of their inputs, as `lora_jax.adapt` takes them.

    Attributes:
      key: a PRNG key.
      rate: the fraction of elements set to zero.
    """

    key: Any
    rate: float = dataclasses.field(metadata={"static": True})

    def choice(self, layout: Layout) -> Any:
        inner = super().choice(layout)
        if not self.per_example:
            return inner, self.key
        numbers = jnp.arange(jax.tree.leaves(inner)[0].shape[0])
        return inner, jax.vmap(jax.random.fold_in, (None, 0))(self.key, numbers)

    def updates(self, layout: Layout, choice: Any) -> UpdateOf:
        inner, key = choice
        of = super().updates(layout, inner)

        def update_of(target: Target, w: Any, names: Names) -> Update | jax.Array:
            update, sizes = of(target, w, names), target.sizes(target.stack)
            stack = tuple(names[i] for i in target.stack)
            if not isinstance(update, Update):
                return update
            return Dropped.start(update, target.path, key, self.rate, stack, sizes)

        return update_of


def dropout(adapters: Any, key: jax.Array | None, rate: float) -> Any:
    """Return adapters whose updates see x with dropout, for the function that `adapt` returns.

        y = x W + scale * (drop(x) a) b        drop(x) = x * mask / (1 - rate)

    The base sees x as it is: this is PEFT's `lora_dropout`. A mask is drawn for each use of each
    target in the program, from the key, the target's path, and the layer or expert of a stack. A
    loop that uses one weight in each step uses one mask. In a mixed batch the key is folded with
    the number of the example. The same key gives the same masks, so a resumed run is the same bit
    for bit if the key of a step depends only on the step.

    Operations without an x have no dropout: lookups (PEFT has none for embeddings either), biases,
    and weights that are folded. A router per token sees the dropped x too. With DoRA,

        y = gain * (x W + scale * (drop(x) a) b)        gain = magnitude / ||W + scale a b||

    so that the mean of y over the masks is the output without dropout, for one product with W.
    (PEFT computes x W + (gain - 1) drop(x) W + ..., which has the same mean, more noise, and
    takes a second product with W.)

    Args:
      adapters: an adapter tree, or the result of `lora_jax.multi.select`, `lora_jax.moe.mix`, ...
      key: a PRNG key, a different one for each step. It may be None if the rate is 0.
      rate: the fraction of the elements of x that are set to zero, a Python number in [0, 1).

    Returns:
      A value for the place of the adapters; at rate 0, `adapters` itself. So evaluation without
      dropout uses rate 0.

    Raises:
      LoraError: a rate out of range, or no key.

    >>> import lora_jax
    >>> f = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    >>> layout = lora_jax.resolve(lora_jax.LoraSpec(1, 1.0, "w"), f, params, x)
    >>> adapters = {"w": lora_jax.Factors(jnp.ones((4, 1)), jnp.ones((1, 3)))}
    >>> y = lora_jax.adapt(layout, f)(params, dropout(adapters, jax.random.key(0), 0.5), x)
    >>> y[:, 0].tolist()  # the base gives 4, and each of the four elements that was kept gives 2
    [6.0, 10.0]
    """
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise LoraError(f"the rate of dropout is a Python number in [0, 1), got {rate!r}")
    if rate == 0:
        return adapters
    if key is None:
        raise LoraError(f"dropout at a rate of {rate} needs a key; pass another one for each step")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return Dropout(adapters, key, float(rate))
