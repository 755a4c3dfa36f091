"""LoKr: the Kronecker product of a small matrix and a low-rank one."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.base import Array, Leaf, W
from lora_jax.errors import LoraError
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors
from lora_jax.updates.kind import Initializer, Kind, uniform

LARGEST = 2**36  # of a size that is split: its divisors are looked for one by one


class KroneckerFactors(NamedTuple):
    """The arrays of a LoKr target, for in = m * n and out = l * k.

    PEFT's `lokr_w1` is `left` transposed, `lokr_w2_a` is b and `lokr_w2_b` is a transposed.

    Attributes:
      left: [*stack, m, l].
      a: [*stack, n, rank].
      b: [*stack, rank, k].
    """

    left: Leaf
    a: Leaf
    b: Leaf


class Lokr(Kind):
    """Low-rank Kronecker product (LoKr; KronA, arXiv 2212.10650; LyCORIS, arXiv 2309.14859).

        W' = W + scale * kron(left, a @ b)      left [m, l], a [n, rank], b [rank, k]

    W is read as the matrix [in, out], with its input axes flattened in the target's order, and its
    output axes too. `in` is split into m * n and `out` into l * k, where m <= n and l <= k are as
    close as the divisors allow (`split`, PEFT's `factorization` with `decompose_factor=-1`).
    Input number i stands for the pair (i // n, i % n), output number j for (j // k, j % k), and

        kron(left, a @ b)[(m, n), (l, k)] = left[m, l] * (a @ b)[n, k]

    which has the exact factors of rank m * rank

        A[(m, n), (m', r)] = (m == m') a[n, r]      B[(m', r), (l, k)] = left[m', l] b[r, k]

    (If l < m, the roles are swapped and the rank is l * rank.) As in PEFT, `left` starts at zero,
    `a` and `b` uniform. A rank above min(n, k) adds nothing and is refused.

    >>> target = Target("w", (6, 8), (), (0,), (1,), rank=1, alpha=1.0, kind="lokr")
    >>> lokr = Lokr()
    >>> lokr.shapes(target)
    KroneckerFactors(left=(2, 2), a=(3, 1), b=(1, 4))
    >>> parameters = KroneckerFactors(jnp.eye(2), jnp.ones((3, 1)), jnp.ones((1, 4)))
    >>> lokr.delta(target, parameters)[:, 0].tolist()
    [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    """

    name = "lokr"
    fields = KroneckerFactors
    zero_at_first = "left"

    def axes(self, target: Target) -> KroneckerFactors:
        # A piece of a flattened axis is not an axis of W. These arrays are small: not sharded.
        own = (*target.stack, None, None)
        return KroneckerFactors(own, own, own)

    def shapes(self, target: Target) -> KroneckerFactors:
        (m, n), (left_out, k) = split(target.fan_in), split(target.fan_out)
        stack, rank = target.sizes(target.stack), target.rank
        return KroneckerFactors((*stack, m, left_out), (*stack, n, rank), (*stack, rank, k))

    def rank_limit(self, target: Target) -> tuple[int, str]:
        for size in (target.fan_in, target.fan_out):
            if not 1 <= size <= LARGEST:
                raise LoraError(
                    f"{target.path!r}: LoKr splits sizes from 1 to {LARGEST:,} into divisors, got "
                    f"{size:,}"
                )
        n, k = split(target.fan_in)[1], split(target.fan_out)[1]
        return min(n, k), f"the smaller of the larger divisors {n} and {k}"

    def init(
        self, key: Array, target: Target, dtype: DTypeLike, a_init: Initializer, w: W | None = None
    ) -> KroneckerFactors:
        left, a, b = self.shapes(target)
        for_a, for_b = jax.random.split(key)
        return KroneckerFactors(
            jnp.zeros(left, dtype),
            uniform(for_a, a, dtype, a[-2]),
            uniform(for_b, b, dtype, target.rank),
        )

    def factors(self, target: Target, parameters: KroneckerFactors) -> Factors:
        left, a, b = (jnp.asarray(x) for x in parameters)
        stack, (rows, columns) = left.shape[:-2], left.shape[-2:]
        small = min(rows, columns)
        unit = jnp.broadcast_to(jnp.eye(small, dtype=left.dtype), (*stack, small, small))
        over_inputs = rows <= columns
        whole_a = _kron(unit if over_inputs else left, a)
        whole_b = _kron(left if over_inputs else unit, b)
        rank = whole_a.shape[-1]
        return Factors(
            whole_a.reshape(*target.a_shape[:-1], rank),
            whole_b.reshape(*stack, rank, *target.sizes(target.outputs)),
        )


def _kron(x: Array, y: Array) -> Array:
    """Return the Kronecker product of the last two axes, for each slice of the stack."""
    product = x[..., :, None, :, None] * y[..., None, :, None, :]
    rows, columns = x.shape[-2] * y.shape[-2], x.shape[-1] * y.shape[-1]
    return product.reshape(*x.shape[:-2], rows, columns)


def split(size: int) -> tuple[int, int]:
    """Return the two divisors (m, n) with m * n == size and m <= n that are closest together.

    >>> split(768), split(11), split(16)
    ((24, 32), (1, 11), (4, 4))
    """
    m = next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
    return m, size // m
