"""Count the parameters that a method trains, by the article's formulas (section 5.1) and ours.

Heads are never counted. d is the width of the model, L the number of its layers.
"""

from __future__ import annotations

from collections.abc import Iterable


def lora(rank: int, shapes: Iterable[tuple[int, int]]) -> int:
    """Return the sum of r (in + out) over the adapted matrices; 2 L_lora d r if all are [d, d].

    >>> lora(8, [(768, 768)] * 24)  # RoBERTa base, query and value
    294912
    """
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes)


def adapter(width: int, size: int, adapters: int, norms: int = 0, per_norm: int = 2) -> int:
    """Return L_adpt (2 d r + r + d) + 2 L_LN d for `adapters` layers of the width `size`.

    `norms` layer norms are trained; `per_norm` is 1 for the RMS norms of a decoder, with no bias.

    >>> adapter(1024, 6, adapters=24, norms=24)  # GPT-2 medium, Adapter^L
    368784
    """
    return adapters * (2 * width * size + size + width) + per_norm * norms * width


def prefix_embedding(width: int, tokens: int) -> int:
    """Return D (lp + li).

    >>> prefix_embedding(12288, 256 + 8)
    3244032
    """
    return width * tokens


def prefix_layer(width: int, tokens: int, layers: int) -> int:
    """Return L d (lp + li)."""
    return layers * prefix_embedding(width, tokens)


def biases(width: int, mlp: int, layers: int) -> int:
    """Return L (7 d + m) + d: the biases of a BERT encoder or a GPT decoder with MLP width m.

    A layer has 3 d for query, key and value, d for the output, m + d for the MLP and 2 d for the
    two norms. The norm outside the layers has d more.

    >>> biases(768, 3072, 12)
    102144
    """
    return layers * (7 * width + mlp) + width


def layer(width: int, mlp: int) -> int:
    """Return 4 (d d + d) + (2 d m + m + d) + 4 d: all parameters of one layer of a BERT encoder.

    >>> layer(768, 3072)
    7087872
    """
    return 4 * (width * width + width) + (2 * width * mlp + mlp + width) + 4 * width
