"""Targets as stacks of plain float64 matrices, and the thin singular value decompositions of them.

An update `a b` of rank r is decomposed without being formed. With the QR factorisations a = Qa Ra
and b^T = Qb Rb,

    a b = Qa (Ra Rb^T) Qb^T = (Qa U) S (Qb V)^T        U S V^T = Ra Rb^T, which is [r, r]

and Qa U has orthonormal columns, as a product of two such matrices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from lora_jax.adapters import Factors
from lora_jax.errors import LoraError
from lora_jax.layout import Target

Array = NDArray[np.float64]


class Svd(NamedTuple):
    """`left * values @ right^T`, the values falling.

    left [*stack, in, r], values [*stack, r], right [*stack, out, r]
    """

    left: Array
    values: Array
    right: Array


def host(x: Any) -> Array:
    """Any array, sharded ones and bfloat16 too, in float64 on the host."""
    return np.asarray(jax.device_get(x)).astype(np.float64)


def of_factors(target: Target, factors: Factors) -> tuple[Array, Array]:
    """`a` as [*stack, in, r] and `b` as [*stack, r, out]. Raises LoraError if not finite."""
    stack = target.sizes(target.stack)
    a, b = host(factors.a), host(factors.b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise LoraError(
            f"{target.path!r}: the factors are not finite, and have no directions; take an adapter "
            "from before its training failed (adapters/best)"
        )
    return a.reshape(*stack, target.fan_in, -1), b.reshape(*stack, -1, target.fan_out)


def of_weight(target: Target, w: Any) -> Any:
    """An array of W's shape as [*stack, in, out], in its own dtype."""
    w = np.asarray(jax.device_get(w)).transpose(*target.stack, *target.inputs, *target.outputs)
    return w.reshape(*target.sizes(target.stack), target.fan_in, target.fan_out)


def to_weight(target: Target, matrix: Any) -> Any:
    """The inverse of `of_weight`."""
    order = (*target.stack, *target.inputs, *target.outputs)
    return matrix.reshape(target.sizes(order)).transpose(np.argsort(order))


def to_factors(target: Target, a: Any, b: Any) -> Factors:
    """[*stack, in, r] and [*stack, r, out] in the shapes of the target's factors."""
    return Factors(a.reshape(target.a_shape), b.reshape(target.b_shape))


def svd(matrix: Array) -> Svd:
    """The thin decomposition of [*stack, m, n]."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return Svd(left, values, right.mT)


def tall_svd(matrix: Array) -> Svd:
    """The same of [*stack, m, r] with m far above r, by way of its QR factorisation."""
    q, r = np.linalg.qr(matrix)
    small = svd(r)
    return Svd(q @ small.left, small.values, small.right)


def update_svd(target: Target, factors: Factors) -> Svd:
    """That of the update `scale * a @ b`, by way of a [rank, rank] matrix; see above."""
    a, b = of_factors(target, factors)
    (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b.mT)
    core = svd(target.scale * ra @ rb.mT)
    return Svd(qa @ core.left, core.values, qb @ core.right)


def defined(values: Array) -> NDArray[np.bool_]:
    """Which singular vectors mean something.

    A singular value that is zero, or as small as rounding in float32 would leave it, has no
    direction of its own: any vector that is orthogonal to the others would do.
    """
    floor = np.finfo(np.float32).eps * values.max(axis=-1, keepdims=True, initial=0.0)
    return values > floor


EXACT = 1024  # up to this min(m, n) LAPACK takes a second at most


def top_svd(matrix: Array, rank: int, tolerance: float = 1e-6) -> Svd:
    """The `rank` largest singular values of one [m, n] matrix, and their vectors.

    Up to min(m, n) = 1024 that is LAPACK's. Beyond it a block of 2 rank + 8 random vectors goes
    through `matrix^T matrix` until the norm of the values moves by less than `tolerance` of itself
    (Halko, Martinsson and Tropp, 2011, algorithm 4.4 with a stop): the values come from below.
    """
    m, n = matrix.shape
    block = 2 * rank + 8
    if min(m, n) <= max(EXACT, block):
        found = svd(matrix)
    else:
        narrow = matrix.astype(np.float32)
        q = np.random.default_rng(0).standard_normal((n, block), np.float32)
        norm = 0.0
        for _ in range(100):
            q = np.linalg.qr(narrow.T @ np.linalg.qr(narrow @ q)[0])[0]
            found = tall_svd((narrow @ q).astype(np.float64))
            found = found._replace(right=q @ found.right)
            before, norm = norm, float(np.linalg.norm(found.values[:rank]))
            if norm - before <= tolerance * norm:
                break
    return Svd(found.left[:, :rank], found.values[:rank], found.right[:, :rank])
