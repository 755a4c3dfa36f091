"""Prefix tuning: learned vectors before and after the tokens of a row.

These are prefix-embedding and prefix-layer tuning as in section 5.1 of the LoRA article, after Li
and Liang (arXiv 2101.00190). The first learns the word embeddings of lp + li special tokens, the
second also their activations at the input of every layer.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from jax import Array

from experiments.methods.sites import Tree

_INITIAL = nn.initializers.normal(0.02)


class Places(NamedTuple):
    """The contents of the positions of longer rows, each [B, T'] with T' = lp + T + li.

    token: the index of the row's own token at a position; arbitrary if there is none.
    slot: the index of the learned vector at a position; -1 if there is none.
    real: bool, whether there is one of the two. Other positions are padding.
    """

    token: Array
    slot: Array
    real: Array


def places(mask: Array, prefix: int, infix: int) -> Places:
    """Return rows with positions for learned vectors before and after their real tokens.

    `mask` [B, T] is True at real tokens, which are the first of their row.

    >>> found = places(jnp.array([[True, True, False]]), prefix=1, infix=2)
    >>> found.slot.tolist(), found.real.tolist()
    ([[0, -1, -1, 1, 2, -1]], [[True, True, True, True, True, False]])
    """
    length = mask.shape[1]
    index = jnp.arange(prefix + length + infix)[None] - prefix
    own = mask.sum(axis=1, keepdims=True, dtype=index.dtype)
    index = jnp.broadcast_to(index, (mask.shape[0], index.shape[1]))
    behind = jnp.broadcast_to(own, index.shape)
    after = index - behind  # the index of the infix at this position
    is_infix = (after >= 0) & (after < infix)
    slot = jnp.where(index < 0, index + prefix, jnp.where(is_infix, prefix + after, -1))
    real = index < behind + infix
    return Places(jnp.clip(index, 0, length - 1), slot, real)


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Learned vectors in the rows of a `models.Bert` encoder.

    The parameters are float32 [lp + li, d]: `embedding`, or with `layers` one under the path of
    each layer. The encoder returns only the hidden states of the row's own tokens, at their old
    positions, so the pooling does not see the learned vectors. Positions are counted over all.

    Attributes:
      encoder: the path of the encoder.
      width: d.
      prefix, infix: lp and li, the numbers of positions before and after a row's tokens.
      layers: the paths of all layers, whose inputs are replaced. Empty: the word embeddings are
        replaced.
    """

    encoder: str
    width: int
    prefix: int
    infix: int
    layers: tuple[str, ...] = ()

    def init(self, key: Array) -> Tree:
        """Return fresh parameters."""
        names = [path.rpartition("/")[2] for path in self.layers] or ["embedding"]
        shape = (self.prefix + self.infix, self.width)
        return {
            name: _INITIAL(jax.random.fold_in(key, index), shape, jnp.float32)
            for index, name in enumerate(names)
        }

    def around(self, params: Tree) -> AbstractContextManager[None]:
        """Return a context manager in which calls of the model have the learned vectors."""

        def longer(call: Any, args: Any, kwargs: Any, context: InterceptorContext) -> Any:
            if context.method_name != "__call__" or _path(context) != self.encoder:
                return call(*args, **kwargs)

            def encode(
                input_ids: Array,
                mask: Array | None = None,
                token_types: Array | None = None,
                **rest: Any,
            ) -> Array:
                mask = jnp.ones(input_ids.shape, bool) if mask is None else mask.astype(bool)
                where = places(mask, self.prefix, self.infix)
                types = None if token_types is None else _moved(token_types, where)
                with nn.intercept_methods(self._replacing(params, where.slot)):
                    hidden = call(_moved(input_ids, where), where.real, types, **rest)
                own: Array = hidden[:, self.prefix : self.prefix + input_ids.shape[1]]
                return own

            return encode(*args, **kwargs)

        return nn.intercept_methods(longer)

    def _replacing(self, params: Tree, slot: Array) -> Any:
        """Return an interceptor that puts the learned vectors in place; see `Places` for `slot`."""
        inputs = {path: params[path.rpartition("/")[2]] for path in self.layers}
        words = {} if self.layers else {f"{self.encoder}/embeddings/word": params["embedding"]}

        def replace(call: Any, args: Any, kwargs: Any, context: InterceptorContext) -> Any:
            path = _path(context) if context.method_name == "__call__" else ""
            if path in words:
                return _put(words[path], slot, call(*args, **kwargs))
            if path in inputs:
                return call(_put(inputs[path], slot, args[0]), *args[1:], **kwargs)
            return call(*args, **kwargs)

        return replace


def _path(context: InterceptorContext) -> str:
    return "/".join(context.module.path)


def _moved(rows: Array, where: Places) -> Array:
    """Move ids [B, T] to [B, T'], with 0 at positions that have none of the row's own tokens."""
    moved = jnp.take_along_axis(rows, where.token, axis=1)
    return jnp.where(where.real & (where.slot < 0), moved, 0)


def _put(vectors: Array, slot: Array, x: Array) -> Array:
    """Replace x [B, T', D] by row `slot` of the vectors at positions where slot is not -1."""
    learned = jnp.take(vectors.astype(x.dtype), jnp.maximum(slot, 0), axis=0)
    return jnp.where(slot[:, :, None] >= 0, learned, x)
