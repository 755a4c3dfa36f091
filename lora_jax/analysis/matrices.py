"""Targets as stacks of float64 matrices, and their thin singular value decompositions.

An update `a b` of rank r is decomposed without being formed. With the QR factorisations a = Qa Ra
and b^T = Qb Rb,

    a b = Qa (Ra Rb^T) Qb^T = (Qa U) S (Qb V)^T        U S V^T = Ra Rb^T, which is [r, r]

and Qa U has orthonormal columns, because it is a product of two such matrices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from lora_jax.base import dense
from lora_jax.errors import LoraError
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors

Array = NDArray[np.float64]


class Svd(NamedTuple):
    """`left * values @ right^T`, with the values in falling order.

    left [*stack, in, r], values [*stack, r], right [*stack, out, r]
    """

    left: Array
    values: Array
    right: Array


def host(x: Any) -> Array:
    """Return any array, even a sharded or bfloat16 one, in float64 on the host."""
    return np.asarray(jax.device_get(x)).astype(np.float64)


def of_factors(target: Target, factors: Factors) -> tuple[Array, Array]:
    """Return `a` as [*stack, in, r] and `b` as [*stack, r, out].

    Raises:
      LoraError: factors that are not finite.
    """
    stack = target.sizes(target.stack)
    a, b = host(factors.a), host(factors.b)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise LoraError(
            f"{target.path!r}: the factors are not finite, and have no directions; take an adapter "
            "from before its training failed (adapters/best)"
        )
    return a.reshape(*stack, target.fan_in, -1), b.reshape(*stack, -1, target.fan_out)


def of_weight(target: Target, w: Any) -> Any:
    """Return a weight of W's shape as [*stack, in, out], in its own dtype, dequantised."""
    w = np.asarray(jax.device_get(dense(w))).transpose(
        *target.stack, *target.inputs, *target.outputs
    )
    return w.reshape(*target.sizes(target.stack), target.fan_in, target.fan_out)


def to_weight(target: Target, matrix: Any) -> Any:
    """Return a weight from [*stack, in, out]: the inverse of `of_weight`."""
    order = (*target.stack, *target.inputs, *target.outputs)
    return matrix.reshape(target.sizes(order)).transpose(np.argsort(order))


def to_factors(target: Target, a: Any, b: Any) -> Factors:
    """Return [*stack, in, r] and [*stack, r, out] in the shapes of the target's factors."""
    return Factors(a.reshape(target.a_shape), b.reshape(target.b_shape))


def svd(matrix: Array) -> Svd:
    """Return the thin decomposition of [*stack, m, n]."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return Svd(left, values, right.mT)


def tall_svd(matrix: Array) -> Svd:
    """Return the decomposition of [*stack, m, r] with m far above r, by QR factorisation first."""
    q, r = np.linalg.qr(matrix)
    small = svd(r)
    return Svd(q @ small.left, small.values, small.right)


def update_svd(target: Target, factors: Factors) -> Svd:
    """Return the decomposition of `scale * a @ b`, through a [rank, rank] matrix; see above."""
    a, b = of_factors(target, factors)
    (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b.mT)
    core = svd(target.scale * ra @ rb.mT)
    return Svd(qa @ core.left, core.values, qb @ core.right)


def shared(top: Svd, scale: float) -> tuple[Array, Array]:
    """Return factors with `scale * a @ b` = left * values @ right^T and equal norms."""
    root = np.sqrt(top.values / scale)
    return top.left * root, root[:, None] * top.right.T


def defined(values: Array) -> NDArray[np.bool_]:
    """Return which singular vectors are meaningful.

    A singular value that is zero, or as small as the rounding errors of float32, has no direction
    of its own: any vector that is orthogonal to the others would do.
    """
    floor = np.finfo(np.float32).eps * values.max(axis=-1, keepdims=True, initial=0.0)
    return values > floor


EXACT = 1024  # up to this min(m, n), LAPACK takes at most a second in float64


def wide(matrix: Any) -> Any:
    """Return an [m, n] matrix in the dtype of computation: float64, or float32 beyond `EXACT`."""
    dtype = np.float64 if min(matrix.shape) <= EXACT else np.float32
    return matrix.astype(dtype, copy=False)


def top_values(matrix: Any, rank: int, tolerance: float = 1e-3) -> Array:
    """Return the `rank` largest singular values of one [m, n] matrix; see `top_svd`."""
    if _small(matrix, rank):
        return np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[:rank]
    return _krylov(wide(matrix), rank, tolerance)[0]


def top_svd(matrix: Any, rank: int, tolerance: float = 1e-3) -> Svd:
    """Return the `rank` largest singular values of one [m, n] matrix, and their vectors.

    Up to min(m, n) = 1024, LAPACK computes them. Larger ones are searched in a block Krylov space,

        span(Q, G Q, G^2 Q, ...)        G = matrix^T matrix, Q random
     which grows until `rank` more columns change the norm of the values found by less than
    `tolerance` of itself (Musco and Musco, 2015). The values come from below, and their error is
    the square of the vectors' error. A falling spectrum is found at once. A Gaussian matrix, whose
    values are close together, is the worst case.
    """
    if _small(matrix, rank):
        found = svd(matrix.astype(np.float64))
        return Svd(found.left[:, :rank], found.values[:rank], found.right[:, :rank])
    matrix = wide(matrix)
    values, basis, gram = _krylov(matrix, rank, tolerance)
    right = basis @ np.linalg.eigh(gram, UPLO="U")[1][:, ::-1][:, :rank]
    left = np.linalg.qr(matrix @ right.astype(np.float32))
    signs = np.where(np.diagonal(left.R) < 0, -1.0, 1.0)
    return Svd(left.Q * signs, values, right)


def _small(matrix: Any, rank: int) -> bool:
    return min(matrix.shape) <= max(EXACT, 2 * (rank + 8))


def _krylov(matrix: Any, rank: int, tolerance: float) -> tuple[Array, Any, Array]:
    """Return, for a float32 matrix, values, an orthonormal basis [n, k], and basis^T G basis.

    Only the upper half of the last one is filled. Nearly all of the time is G times a block, on
    JAX's default device, because XLA's product with a block is twice as fast as OpenBLAS's. Blocks
    of half the rank get as far with three quarters of the columns that blocks of `rank` need;
    smaller blocks leave cores idle. If the basis already holds G times a block, only rounding is
    left, perhaps along the basis. Random noise above it turns that into new columns, so the basis
    stays orthonormal, and a repeated value is found as often as it occurs.
    """
    block, limit = max(16, rank // 2), min(matrix.shape)
    every = -(-rank // block) * block
    pair = jnp.asarray(matrix), jnp.asarray(_turned(matrix))
    basis: Any = np.empty((limit, matrix.shape[1]), np.float32).T  # takes memory when written
    gram = np.zeros((limit, limit))
    rng = np.random.default_rng(0)
    new: Any = _orthonormal(rng.standard_normal((matrix.shape[1], block), np.float32))
    size, before = 0, 0.0
    while True:
        basis[:, size : size + block] = new
        size += block
        held, new = basis[:, :size], np.asarray(_squared(*pair, new))
        along = held.T @ new
        gram[:size, size - block : size] = along
        full = size + block > limit
        if size % every == 0 or full:
            squares = np.linalg.eigvalsh(gram[:size, :size], UPLO="U")[::-1][:rank]
            norm = float(np.sqrt(np.maximum(squares, 0).sum()))
            if full or norm - before <= tolerance * norm:
                return np.sqrt(np.maximum(squares, 0)), held, gram[:size, :size]
            before = norm
        least = 1e-6 * max(float(np.abs(new).max()), 1e-30)
        noise = least * rng.standard_normal(new.shape, np.float32)
        new = _orthonormal(new - held @ along + noise)
        new = _orthonormal(new - held @ (held.T @ new))  # a second time, against rounding


@jax.jit
def _squared(w: jax.Array, turned: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.matmul(turned, jnp.matmul(w, x, precision="highest"), precision="highest")


def _turned(w: Any) -> Any:
    """Return a copy of w^T by strips that stay in the cache, in half of NumPy's time."""
    out = np.empty(w.shape[::-1], w.dtype)
    for i in range(0, len(w), 64):
        out[:, i : i + 64] = w[i : i + 64].T
    return out


def _orthonormal(columns: Any) -> Any:
    """Return orthonormal columns with the same span, in float32, computed by products only.

    In a thin QR factorisation the threads wait for each other.
    """
    columns = columns.astype(np.float64)
    squares, turn = np.linalg.eigh(columns.T @ columns)
    least = max(1e-15 * squares[-1], np.finfo(np.float64).tiny)
    return (columns @ (turn / np.sqrt(np.maximum(squares, least)))).astype(np.float32)
