"""Adapter dropout: an update that sees x with some of its elements set to zero."""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.base import Array
from lora_jax.updates.named import EXTRA, Named, Names
from lora_jax.updates.update import Operation, Update, Wrapper, Zero


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropped(Wrapper):
    """An update whose products take `x * mask / (1 - rate)`, while the base takes x itself.

    keys: uint32 [*stack, words], the data of one PRNG key for each slice of W's stack. So a program
      that slices W slices the keys as well. A mask is drawn from the key of the slice and the
      number of the use in the program (`Operation.use`).
    rate: the probability of a zero.
    impl: the implementation of the keys.
    """

    keys: Named
    rate: float = dataclasses.field(metadata={"static": True})
    impl: Any = dataclasses.field(metadata={"static": True})

    @staticmethod
    def start(
        inner: Update, path: str, key: Any, rate: float, stack: Names, sizes: tuple[int, ...]
    ) -> Update:
        """Return the update of the weight at `path`; its stack axes have these names and sizes."""
        own = jax.random.fold_in(key, zlib.crc32(path.encode()))
        data = jax.random.key_data(jax.random.split(own, sizes) if sizes else own)
        keys = Named(data, (*stack, EXTRA))
        return Dropped(Zero(), keys, rate, jax.random.key_impl(key)).around(inner)

    def around(self, inner: Update) -> Update:
        """Return the inner update with dropout; what multiplies the whole sum stays outermost."""
        if isinstance(inner, Wrapper) and not inner.additive:
            return inner.around(self.around(inner.inner))
        return dataclasses.replace(self, inner=inner)

    def product(self, p: Operation) -> Array:
        return self.inner.product(dataclasses.replace(p, drop=lambda x: self._drop(x, p.use)))

    def _drop(self, x: Named, use: int) -> Named:
        """Return x with one mask for each slice of the stack that x itself has."""
        names = self.keys.names[:-1]
        stack = tuple(n for n in names if n in x.names)
        first = tuple(slice(None) if n in stack else 0 for n in names)  # one x for all slices
        keys = jax.random.wrap_key_data(self.keys.array[first], impl=self.impl)
        front = x.to_front(stack)
        shape = front.array.shape[len(stack) :]

        def keep(key: Any) -> Any:
            return jax.random.bernoulli(jax.random.fold_in(key, use), 1 - self.rate, shape)

        count = math.prod(map(x.size, stack))
        mask = jax.vmap(keep)(keys.reshape(count)).reshape(front.array.shape)
        scaled = front.array / jnp.asarray(1 - self.rate, front.array.dtype)
        return Named(jnp.where(mask, scaled, jnp.zeros_like(scaled)), front.names).moved(x.names)
