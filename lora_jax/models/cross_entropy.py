"""Cross entropy over a large vocabulary, without the logits of all tokens at once."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array


def cross_entropy(logits: Array, targets: Array, smoothing: float = 0.0) -> Array:
    """Return the cross entropy of each target, float32 [...], for logits [..., V].

    With label smoothing (Szegedy et al., arXiv 1512.00567), the label is 1 - smoothing at the
    target, plus smoothing / V at each of the V classes.
    """
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    if smoothing == 0:
        return each
    of_all = jax.nn.logsumexp(logits, axis=-1) - logits.mean(axis=-1)  # the mean over all classes
    return (1 - smoothing) * each + smoothing * of_all


def chunked_cross_entropy(
    head: Callable[[Array], Array],
    hidden: Array,
    targets: Array,
    chunk: int,
    smoothing: float = 0.0,
) -> Array:
    """Return the cross entropy of each target [B, T], for `chunk` positions of every row at a time.

    The logits of T positions are B T V numbers, the largest array of most decoders, and their
    gradient is as large. Here only B x chunk x V of them exist at a time. Forward, the chunks are
    computed one after the other and only their losses are kept. Backward, each chunk's logits are
    computed again, which costs one more product with the head. Rows are split along T and not along
    B, so that nothing has to move if B is sharded over devices.

    Arrays that `head` ([B, t, D] -> [B, t, V]) closes over are differentiated, too.

    >>> table = jax.random.normal(jax.random.key(0), (9, 4))
    >>> hidden, targets = jnp.ones((2, 5, 4)), jnp.ones((2, 5), jnp.int32)
    >>> in_parts = chunked_cross_entropy(lambda x: x @ table.T, hidden, targets, chunk=2)
    >>> whole = optax.softmax_cross_entropy_with_integer_labels(hidden @ table.T, targets)
    >>> bool(jnp.allclose(in_parts, whole))
    True
    """
    batch, length = targets.shape
    chunk = min(chunk, length)
    parts = -(-length // chunk)
    split = functools.partial(_split, parts=parts, chunk=chunk)

    @jax.checkpoint
    def one(x: Array, target: Array) -> Array:
        return cross_entropy(head(x).astype(jnp.float32), target, smoothing)

    each = jax.lax.map(lambda part: one(*part), (split(hidden), split(targets)))
    return each.swapaxes(0, 1).reshape(batch, parts * chunk)[:, :length]


def _split(x: Array, parts: int, chunk: int) -> Array:
    """Split [B, T, ...] into [parts, B, chunk, ...], with zeros at the end."""
    spare = parts * chunk - x.shape[1]
    padded = jnp.pad(x, [(0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2)])
    return padded.reshape(x.shape[0], parts, chunk, *x.shape[2:]).swapaxes(0, 1)
