"""The number of parameters that a method trains, by the article's formulae (section 5.1) and ours.

Heads are not counted, here or there. d is the width of the model, L the number of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable


def lora(rank: int, shapes: Iterable[tuple[int, int]]) -> int:
    """The sum of r (in + out) over the adapted matrices; 2 L_lora d r where all are [d, d].

    >>> lora(8, [(768, 768)] * 24)  # RoBERTa base, query and value
    294912
    """
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes)


def adapter(width: int, size: int, adapters: int, norms: int = 0, per_norm: int = 2) -> int:
    """L_adpt (2 d r + r + d) + 2 L_LN d.

    Args:
      width, size: d and r.
      adapters: L_adpt, the number of adapter layers.
      norms: L_LN, the number of layer norms trained.
      per_norm: vectors of a norm: 2, scale and bias; 1 for the RMS norms of a decoder.

    >>> adapter(1024, 6, adapters=24, norms=24)  # GPT-2 medium, Adapter^L
    368784
    """
    return adapters * (2 * width * size + size + width) + per_norm * norms * width


def prefix_embedding(width: int, tokens: int) -> int:
    """D (lp + li).

    >>> prefix_embedding(12288, 256 + 8)
    3244032
    """
    return width * tokens


def prefix_layer(width: int, tokens: int, layers: int) -> int:
    """L d (lp + li)."""
    return layers * prefix_embedding(width, tokens)


def biases(width: int, mlp: int, layers: int) -> int:
    """L (7 d + m) + d: the bias vectors of a BERT encoder or a GPT decoder of MLP width m.

    In a layer 3 d of query, key and value, d of the output, m + d of the MLP and 2 d of the two
    norms; d more of the one norm outside the layers.

    >>> biases(768, 3072, 12)
    102144
    """
    return layers * (7 * width + mlp) + width


def layer(width: int, mlp: int) -> int:
    """4 (d d + d) + (2 d m + m + d) + 4 d: one layer of a BERT encoder, all of it.

    >>> layer(768, 3072)
    7087872
    """
    return 4 * (width * width + width) + (2 * width * mlp + mlp + width) + 4 * width
