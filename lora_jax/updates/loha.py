"""LoHa: the elementwise product of two low-rank matrices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.base import Array, Leaf, W
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors
from lora_jax.updates.kind import Initializer, Kind, uniform


class HadamardFactors(NamedTuple):
    """The arrays of a LoHa target: two pairs of factors.

    PEFT's `hada_w1_a`, `hada_w1_b` are b1 and a1 transposed, `hada_w2_a`, `hada_w2_b` b2 and a2.

    Attributes:
      a1, a2: [*stack, *inputs, rank].
      b1, b2: [*stack, rank, *outputs].
    """

    a1: Leaf
    b1: Leaf
    a2: Leaf
    b2: Leaf


class Loha(Kind):
    """Low-rank Hadamard product (LoHa; FedPara, arXiv 2108.06098; LyCORIS, arXiv 2309.14859).

        W' = W + scale * (a1 @ b1) * (a2 @ b2)          `*` elementwise; rank up to rank^2

    An elementwise product of two sums over the rank is one sum over pairs of ranks, so the update
    has the exact factors (the Khatri-Rao product of the two)

        a[i, (k, l)] = a1[i, k] a2[i, l]        b[(k, l), j] = b1[k, j] b2[l, j]

    of rank rank^2. So the matrix of W's size that other libraries form is never formed. As in PEFT,
    `a2` starts at zero and the others are uniform; `a1` is drawn by `a_init`.

    >>> target = Target("w", (5, 4), (), (0,), (1,), rank=2, alpha=2.0, kind="loha")
    >>> loha = Loha()
    >>> parameters = HadamardFactors(*(jnp.ones(s) for s in loha.shapes(target)))
    >>> jax.tree.map(jnp.shape, loha.factors(target, parameters))
    Factors(a=(5, 4), b=(4, 4))
    >>> float(loha.delta(target, parameters)[0, 0])  # (1 + 1) * (1 + 1)
    4.0
    """

    name = "loha"
    fields = HadamardFactors
    zero_at_first = "a2"

    def axes(self, target: Target) -> HadamardFactors:
        a, b = (*target.stack, *target.inputs, None), (*target.stack, None, *target.outputs)
        return HadamardFactors(a, b, a, b)

    def init(
        self, key: Array, target: Target, dtype: DTypeLike, a_init: Initializer, w: W | None = None
    ) -> HadamardFactors:
        for_a, for_1, for_2 = jax.random.split(key, 3)
        b1, b2 = (uniform(k, target.b_shape, dtype, target.rank) for k in (for_1, for_2))
        return HadamardFactors(
            a_init(for_a, target, dtype), b1, jnp.zeros(target.a_shape, dtype), b2
        )

    def factors(self, target: Target, parameters: HadamardFactors) -> Factors:
        a1, b1, a2, b2 = (jnp.asarray(x) for x in parameters)
        n = len(target.stack)
        a = a1[..., :, None] * a2[..., None, :]
        b = jnp.expand_dims(b1, n + 1) * jnp.expand_dims(b2, n)
        pairs = target.rank**2
        return Factors(
            a.reshape(*a1.shape[:-1], pairs), b.reshape(*b1.shape[:n], pairs, *b1.shape[n + 1 :])
        )
