"""The tokens that each token of a row sees: padding, packed rows, causality, windows, caches."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "columns", "real", "row_segments", "segments", "reach"),
    meta_fields=("causal", "window"),
)
@dataclasses.dataclass(frozen=True)
class Sight:
    """The tokens, of S, that each of T tokens sees. A mask [T, S] is formed only where it is used.

    A token sees the real tokens of its own segment: if causal, none after itself, and in a window
    none that is `window` or more tokens away.

    Attributes:
      rows: the positions of the tokens that look, int32 [B or 1, T]. None: 0, 1, ..., T - 1.
      columns: the positions of the tokens that are seen, int32 [B, S]. None: 0, 1, ..., S - 1.
      real: bool [B, S], False at tokens that nobody sees. None: all are real.
      row_segments: int [B, T], the segments of the tokens that look. None: there is one segment.
      segments: int [B, S], the segments of the tokens that are seen.
      reach: the window as a scalar array, in layers whose kind is known only in the program.
      causal: whether a token sees none after itself.
      window: the window, or None.
    """

    rows: Array | None = None
    columns: Array | None = None
    real: Array | None = None
    row_segments: Array | None = None
    segments: Array | None = None
    reach: Array | None = None
    causal: bool = False
    window: int | None = None

    def mask(self, rows: int, columns: int) -> Array | None:
        """Return the mask of T = `rows` tokens over S = `columns`: bool, broadcastable to
        [B, 1, T, S]; None if all see all."""
        parts = []
        reach = self.window if self.reach is None else self.reach
        if self.causal or reach is not None:
            row = jnp.arange(rows)[None] if self.rows is None else self.rows
            column = jnp.arange(columns)[None] if self.columns is None else self.columns
            distance = row[:, :, None] - column[:, None, :]
            if self.causal:
                parts.append(distance >= 0)
            if reach is not None:
                distance = distance if self.causal else jnp.abs(distance)
                parts.append(distance < reach)
        if self.real is not None:
            parts.append(self.real[:, None, :])
        if self.row_segments is not None and self.segments is not None:
            parts.append(self.row_segments[:, :, None] == self.segments[:, None, :])
        return functools.reduce(operator.and_, parts)[:, None] if parts else None

    def block(self, start: Array, count: int) -> Sight:
        """Return the sight of `count` of the tokens that look, from `start`."""
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, slice_size=count, axis=1)
        rows = (start + jnp.arange(count))[None] if self.rows is None else cut(self.rows, start)
        segments = None if self.row_segments is None else cut(self.row_segments, start)
        return dataclasses.replace(self, rows=rows, row_segments=segments)


def visible(
    length: int,
    mask: Array | None = None,
    segment_ids: Array | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
) -> Sight:
    """Return the sight of whole rows of `length` tokens.

    Only real tokens (`mask` [B, T]) of the same segment (`segment_ids` [B, T]) are seen. With a
    window a token sees itself, at most window - 1 tokens before it and, unless causal, as many
    after it.
    """
    real = None if mask is None else mask.astype(bool)
    window = None if window is None or window >= length else window
    segments = {"row_segments": segment_ids, "segments": segment_ids}
    return Sight(real=real, **segments, causal=causal, window=window)


class View(NamedTuple):
    """The rotary angles of the tokens in a kind of layer (None: no rotation), and their sight."""

    turn: tuple[Array, Array] | None
    sight: Sight


def either(first: Array, one: View, other: View) -> View:
    """Return `one` where the scalar `first` is True, else `other`; their sights differ in windows
    only."""
    turn = jax.tree.map(lambda *each: jnp.where(first, *each), one.turn, other.turn)
    windows = [view.sight.window for view in (one, other)]
    if windows[0] == windows[1]:
        return View(turn, one.sight)
    far = jnp.iinfo(jnp.int32).max
    sizes = [jnp.int32(far if window is None else window) for window in windows]
    reach = jnp.where(first, sizes[0], sizes[1])
    return View(turn, dataclasses.replace(one.sight, window=None, reach=reach))


def positions_in(segment_ids: Array) -> Array:
    """Return positions [B, T] that restart with each segment; equal ids must be adjacent."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    first = jnp.ones_like(segment_ids[:, :1], bool)
    starts = jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
