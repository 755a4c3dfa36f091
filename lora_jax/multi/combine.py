"""Several adapters made into one: `sum_i w_i * scale_i * a_i @ b_i`, exactly or at a lower rank.

A product of sums is not a sum of products. Adding up the factors themselves, which other libraries
offer under the name "linear", gives

    (sum_i a_i) @ (sum_j b_j) = sum_i a_i @ b_i  +  sum_{i != j} a_i @ b_j

The cross terms mean nothing and are as large as the sum itself, so this is not offered here.
Concatenated along the rank, the factors do multiply to the sum,

    [a_1 a_2 ...] @ [c_1 b_1; c_2 b_2; ...] = sum_i c_i a_i @ b_i        c_i = w_i * scale_i

at the cost of a rank that is the sum of the ranks. `truncate` lowers it again, as well as any
matrix of that rank can.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_jax.adapters import Adapter, Adapters, as_factors, factors_alone
from lora_jax.base import Array, wide_dtype
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.spec import Target, check_rank
from lora_jax.updates.factors import Factors


class Truncation(NamedTuple):
    """The part of one target's update that `truncate` cut off, over its whole stack.

    Attributes:
      error: its Frobenius norm, the root of the sum of squares of the singular values cut off.
      relative: that norm divided by the norm of the whole update; 0 if the update is 0.
    """

    error: Any
    relative: Any


def combine(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """Return one adapter whose update is `sum_i weights[i] * (the update of adapters[i])`.

    Ranks, alphas and targets may differ: the rank of a target is the sum over the adapters that
    adapt it. Weights and scales are folded into `b`, so every scale of the result is 1. If the
    ranks add up to more than min(in, out), the factors are rewritten at that rank, which holds any
    update in full. No update is ever lost here.

    Args:
      adapters: adapters of one model.
      weights: one finite number for each, of any sign; they need not sum to 1.

    Returns:
      An ordinary `Adapter`, which `save`, `stack` and `truncate` take. The factors are float32
      (float64 if an adapter's are).

    Raises:
      LoraError: no adapters, a number of weights that differs from the number of adapters, a weight
        that is not finite, or adapters that do not fit their layout, have trainable base
        parameters, or adapt one path as parameters of different shapes or roles.

    >>> import jax, lora_jax
    >>> f = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.zeros((6, 5))}, jnp.ones((2, 6))
    >>> layout = lora_jax.resolve(lora_jax.LoraSpec(2, 2.0, "w"), f, params, x)
    >>> one = {"w": Factors(jnp.ones((6, 2)), jnp.ones((2, 5)))}
    >>> two = {"w": Factors(jnp.ones((6, 2)), 10 * jnp.ones((2, 5)))}
    >>> both, adapters, _ = combine([(layout, one), (layout, two)], [0.5, 1.0])
    >>> both["w"].rank, float(lora_jax.merge(both, params, adapters)["w"][0, 0])
    (4, 21.0)
    """
    members = [factors_alone(adapter, "combined") for adapter in adapters]
    members = [Adapter(*as_factors(member.layout, member.parameters)) for member in members]
    _check(members, weights)
    parts: dict[str, list[tuple[Target, Factors, float]]] = {}
    for member, weight in zip(members, weights, strict=True):
        for target in member.layout.targets:
            factors = member.parameters[target.path]
            parts.setdefault(target.path, []).append((target, factors, weight * target.scale))
    joined = [_joined(path, rows) for path, rows in parts.items()]
    layout = Layout(tuple(t for t, _ in joined))
    return Adapter(layout, {t.path: factors for t, factors in joined})


def truncate(
    adapter: Adapter, rank: int, *, share: bool = False
) -> tuple[Adapter, dict[str, Truncation]]:
    """Return the nearest adapter of at most `rank` (Eckart-Young), and the loss of each target.

    The singular values come from the two thin QR factorisations of `a` and `b` and a square
    matrix of the present rank, never from an [in, out] matrix. Layers and experts are one batch.
    A target whose rank is not above `rank` stays as it is, bit for bit.

    With `share`, `rank` is the mean over all matrices, and the largest singular values of all
    targets together are kept (the last step of AdaLoRA, arXiv 2303.10512, after training). Slices
    of a stack have one rank. A target without any of them is left out of the layout.

    Args:
      adapter: trained at a higher rank, or made by `combine`.
      rank: the highest rank to keep.
      share: whether the ranks of all targets are one budget. The adapter must be concrete then.

    Returns:
      (adapter, {path: Truncation}). In a target that was cut, the scale is 1, and `a` and `b` share
      each singular value evenly. The factors keep their dtypes; the work is done in float32
      (float64 for float64).

    Raises:
      LoraError: a rank below 1, or adapters that do not fit the layout.

    >>> from lora_jax.spec import Target
    >>> layout = Layout((Target("w", (3, 4), (), (0,), (1,), rank=2, alpha=2.0),))
    >>> factors = Factors(jnp.diag(jnp.array([4.0, 3.0, 0.0]))[:, :2], jnp.eye(2, 4))
    >>> smaller, lost = truncate(Adapter(layout, {"w": factors}), 1)
    >>> smaller.layout["w"].rank, [round(float(x), 5) for x in lost["w"]]
    (1, [3.0, 0.6])
    """
    check_rank(rank, "truncate")
    adapter = Adapter(*adapter)
    layout, adapters = as_factors(adapter.layout, adapter.parameters)
    ranks = _shared_ranks(layout, adapters, rank) if share else {}
    targets, kept, cuts = [], {}, {}
    for target in layout.targets:
        factors, path = adapters[target.path], target.path
        limit = ranks.get(path, rank)
        cuts[path] = Truncation(jnp.zeros(()), jnp.zeros(()))
        if target.rank > limit:
            small, cuts[path] = _nearest(_exact(target, factors), len(target.stack), limit)
            factors = Factors(*(x.astype(y.dtype) for x, y in zip(small, factors, strict=True)))
        if limit:
            cut = target.plain(limit) if target.rank > limit else target
            targets.append(dataclasses.replace(cut, fold=target.fold))
            kept[path] = factors
    return adapter._replace(layout=Layout(tuple(targets)), parameters=kept), cuts


def _exact(target: Target, factors: Factors) -> Factors:
    """Return factors of scale 1, in float32 or wider."""
    a, b = jnp.asarray(factors.a), jnp.asarray(factors.b)
    wide = wide_dtype(jnp.promote_types(a.dtype, b.dtype))
    return Factors(a.astype(wide), target.scale * b.astype(wide))


def _shared_ranks(layout: Layout, adapters: Adapters, rank: int) -> dict[str, int]:
    """Return the rank of each target if all share `rank` for each matrix by singular values."""
    slices = {t.path: math.prod(t.sizes(t.stack)) for t in layout.targets}
    found: list[tuple[float, str]] = []
    for target in layout.targets:
        _, _, core = _core(_exact(target, adapters[target.path]), len(target.stack))
        values = jnp.linalg.svd(core, compute_uv=False).reshape(-1, core.shape[-1])
        found += [(float(x), target.path) for x in jnp.mean(values**2, axis=0)]
    budget, ranks = rank * sum(slices.values()), dict.fromkeys(slices, 0)
    for _, path in sorted(found, key=lambda pair: -pair[0]):
        if slices[path] <= budget:
            budget -= slices[path]
            ranks[path] += 1
    return ranks


def _check(members: Sequence[Adapter], weights: Sequence[float]) -> None:
    if not members:
        raise LoraError("there is nothing to combine: pass at least one Adapter(layout, adapters)")
    if len(members) != len(weights):
        raise LoraError(
            f"combine needs one weight for each adapter: got {len(members)} adapters and "
            f"{len(weights)} weights"
        )
    if not all(map(math.isfinite, weights)):
        raise LoraError(f"the weights must be finite numbers, got {list(weights)}")


def _joined(path: str, rows: Sequence[tuple[Target, Factors, float]]) -> tuple[Target, Factors]:
    """Return one target of the result, from each member's (target, factors, weight times scale)."""
    first = rows[0][0]
    for target, _, _ in rows:
        if target.form != first.form:
            raise LoraError(
                f"{path!r} is not the same parameter in all adapters: (shape, stack, inputs, "
                f"outputs) is {first.form} in one and {target.form} in another; adapters that "
                "are combined must belong to one model, resolved alike"
            )
    dtypes = [jnp.asarray(x).dtype for _, factors, _ in rows for x in factors]
    wide = jnp.float64 if jnp.float64 in dtypes else jnp.float32
    n_stack = len(first.stack)
    factors = Factors(
        jnp.concatenate([jnp.asarray(f.a, wide) for _, f, _ in rows], axis=-1),
        jnp.concatenate([c * jnp.asarray(f.b, wide) for _, f, c in rows], axis=n_stack),
    )
    full = min(first.fan_in, first.fan_out)
    rank = min(full, sum(t.rank for t, _, _ in rows))
    if rank < factors.a.shape[-1]:
        factors, _ = _nearest(factors, n_stack, rank)
    fold = any(t.fold for t, _, _ in rows)
    return dataclasses.replace(first.plain(rank), fold=fold), factors


def _nearest(factors: Factors, n_stack: int, rank: int) -> tuple[Factors, Truncation]:
    """Return the best approximation of `a @ b` by factors of `rank`, for each slice of the stack.

    With a = Qa Ra and b^T = Qb Rb, `a b` has the singular values of the small matrix `Ra Rb^T`.
    """
    qa, qb, core = _core(factors, n_stack)
    u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    small_a = jnp.matmul(qa, u[..., :rank] * root[..., None, :], precision="highest")
    small_b = jnp.matmul(root[..., None] * vt[..., :rank, :], qb.mT, precision="highest")
    error, whole = jnp.linalg.norm(s[..., rank:]), jnp.linalg.norm(s)
    relative = jnp.where(whole > 0, error / jnp.where(whole > 0, whole, 1), 0)
    shape_a = (*factors.a.shape[:-1], rank)
    shape_b = (*factors.b.shape[:n_stack], rank, *factors.b.shape[n_stack + 1 :])
    return Factors(small_a.reshape(shape_a), small_b.reshape(shape_b)), Truncation(error, relative)


def _core(factors: Factors, n_stack: int) -> tuple[Array, Array, Array]:
    """Return Qa, Qb and `Ra Rb^T`."""
    stack = factors.a.shape[:n_stack]
    a = factors.a.reshape(*stack, -1, factors.a.shape[-1])
    b = factors.b.reshape(*stack, factors.b.shape[n_stack], -1)
    (qa, ra), (qb, rb) = jnp.linalg.qr(a), jnp.linalg.qr(b.mT)
    return qa, qb, jnp.matmul(ra, rb.mT, precision="highest")
