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


EXACT = 1024  # up to this min(m, n) LAPACK takes a second at most, in float64


def wide(matrix: Any) -> Any:
    """One [m, n] matrix of any dtype as it is computed with: float64, or float32 beyond `EXACT`."""
    return matrix.astype(np.float64 if min(matrix.shape) <= EXACT else np.float32)


def top_svd(matrix: Any, rank: int, tolerance: float = 1e-3) -> Svd:
    """The `rank` largest singular values of one [m, n] matrix, and their vectors.

    Up to min(m, n) = 1024 that is LAPACK's. Beyond it they are sought in a block Krylov space,

        span(Q, G Q, G^2 Q, ...)        G = matrix^T matrix, Q random [n, rank + 8]

    which grows until the norm of the values found moves by less than `tolerance` of itself (Musco
    and Musco, 2015). They come from below. A spectrum that falls is found at once; a Gaussian
    matrix, whose values lie close together, is the worst case.
    """
    block, limit = rank + 8, min(matrix.shape)
    if limit <= max(EXACT, 2 * block):
        found = svd(matrix.astype(np.float64))
        return Svd(found.left[:, :rank], found.values[:rank], found.right[:, :rank])
    matrix = matrix.astype(np.float32)
    new: Any = np.random.default_rng(0).standard_normal((matrix.shape[1], block), np.float32)
    basis: Any = np.zeros((matrix.shape[1], 0), np.float32)
    image: Any = np.zeros((matrix.shape[0], 0), np.float32)  # matrix @ basis
    before = 0.0
    while True:
        for _ in range(2):  # once leaves rounding along the basis, twice does not
            new = new - basis @ (basis.T @ new)
        basis = np.concatenate([basis, np.linalg.qr(new)[0]], axis=1)
        image = np.concatenate([image, matrix @ basis[:, -block:]], axis=1)
        squares, vectors = np.linalg.eigh((image.T @ image).astype(np.float64))
        values = np.sqrt(np.maximum(squares[::-1][:rank], 0))
        norm = float(np.linalg.norm(values))
        if norm - before <= tolerance * norm or basis.shape[1] + block > limit:
            break
        before, new = norm, matrix.T @ image[:, -block:]
    top = vectors[:, ::-1][:, :rank]
    left = np.linalg.qr(image @ top)
    signs = np.where(np.diagonal(left.R) < 0, -1.0, 1.0)
    return Svd(left.Q * signs, values, basis @ top)
