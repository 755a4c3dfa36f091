"""Decompose full matrices into low-rank factors: a fine-tuning's difference, or W itself."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.adapters import Adapter, Adapters
from lora_jax.analysis import matrices
from lora_jax.analysis.matrices import Array, Svd
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.multi.combine import Truncation
from lora_jax.spec import check_rank
from lora_jax.target import Target
from lora_jax.updates.kind import Factors


class Extraction(NamedTuple):
    """The best adapter of a full fine-tuning, and what it leaves out.

    adapter: an ordinary adapter, of scale 1.
    truncation: `{path: Truncation}`, the norm of the singular values that were cut off, over all
      of a stack, and relative to the whole difference.
    untargeted: `{path: norm}`, the norm of the difference of every parameter that changed and is
      not a target: biases, norms, matrices outside of the layout. No adapter of this layout can
      hold them.
    """

    adapter: Adapter
    truncation: dict[str, Truncation]
    untargeted: dict[str, float]


class Principal(NamedTuple):
    """W split into what its top directions hold and the rest; see `principal`."""

    params: Any
    adapters: Adapters


def extract(layout: Layout, base: Any, finetuned: Any, rank: int | None = None) -> Extraction:
    """The adapter of at most `rank` that is nearest to `finetuned - base`, in every target.

    The truncated singular value decomposition of the difference, so no adapter of that rank is
    nearer in the Frobenius norm (Eckart and Young, 1936), and the error is known: the norm of the
    values left out. This decomposes matrices of the full size, by LAPACK in float64: about a
    minute for one of 4,096 x 4,096 on two cores.

    Args:
      layout: from `lora_jax.resolve` on the model: which parameters, and their axes.
      base, finetuned: parameter trees of the same structure and shapes.
      rank: of every target; by default each has its own of the layout.

    Raises:
      LoraError: trees that differ in structure or shapes, a layout that does not fit them, a rank
        out of range.

    >>> layout = Layout((Target("w", (3, 3), (), (0,), (1,), rank=1, alpha=1.0),))
    >>> base = {"w": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}
    >>> tuned = {"w": jnp.diag(jnp.array([4.0, 3.0, 0.0])), "bias": jnp.array([0.0, 2.0, 0.0])}
    >>> found = extract(layout, base, tuned)
    >>> float(found.truncation["w"].error), float(found.truncation["w"].relative), found.untargeted
    (3.0, 0.6, {'bias': 2.0})
    """
    before, after = paths.flatten(base), paths.flatten(finetuned)
    _check_same(before, after)
    layout.check_params(before)
    if rank is not None:
        check_rank(rank, "extract")
    targets, adapters, cuts = [], {}, {}
    for target in layout.targets:
        kept = target.rank if rank is None else rank
        target = dataclasses.replace(target, rank=kept, alpha=float(kept))
        pair = (matrices.of_weight(target, tree[target.path]) for tree in (before, after))
        adapters[target.path], cuts[target.path] = _nearest(target, *pair)
        targets.append(target)
    moved = {
        path: float(np.linalg.norm(matrices.host(after[path]) - matrices.host(before[path])))
        for path in before
        if path not in adapters
    }
    untargeted = {path: norm for path, norm in moved.items() if norm != 0}
    return Extraction(Adapter(Layout(tuple(targets)), adapters), cuts, untargeted)


def principal(layout: Layout, params: Any) -> Principal:
    """Adapters that start with W's own top directions, over a base that lacks them.

        W = R + scale * a @ b          a b: W's `rank` largest singular values and their vectors

    So the first steps move what W does most, instead of an A that is random and a B that is zero.
    `adapt(layout, f)(R, adapters, x)` is `f(params, x)` at step 0, up to the rounding of R to W's
    dtype: R is formed from the factors as they are stored, however exact they are.

    R is the frozen base from then on. What was learnt, as an adapter over the original base, has
    twice the rank: `combine([(layout, trained), (layout, start)], [1.0, -1.0])`.

    Args:
      layout: from `lora_jax.resolve`, with the ranks to use.
      params: the base parameters; not changed.

    Returns:
      (R, adapters): a tree like `params`, with its dtypes and shardings, and float32 factors that
      share each singular value evenly. Values of matrices above 1,024 are iterated; see
      `lora_jax.analysis.matrices.top_svd`.

    Raises:
      LoraError: a layout that does not fit the parameters.
    """
    leaves = paths.flatten(params)
    layout.check_params(leaves)
    rest, adapters = {}, {}
    for target in layout.targets:
        w = leaves[target.path]
        weight = matrices.of_weight(target, w)
        stack = weight.shape[:-2]
        a = np.zeros((*stack, target.fan_in, target.rank), np.float32)
        b = np.zeros((*stack, target.rank, target.fan_out), np.float32)
        residual = np.zeros_like(weight)
        for at in np.ndindex(stack):
            full = weight[at].astype(np.float64)
            a[at], b[at] = _shared(matrices.top_svd(full, target.rank), target.scale)
            update = target.scale * a[at].astype(np.float64) @ b[at].astype(np.float64)
            residual[at] = (full - update).astype(weight.dtype)
        adapters[target.path] = matrices.to_factors(target, jnp.asarray(a), jnp.asarray(b))
        rest[target.path] = _like(w, matrices.to_weight(target, residual))
    return Principal(paths.replace(params, rest), adapters)


def _nearest(target: Target, before: Any, after: Any) -> tuple[Factors, Truncation]:
    """The truncated decomposition of every slice of `after - before`."""
    stack = before.shape[:-2]
    a = np.zeros((*stack, target.fan_in, target.rank), np.float32)
    b = np.zeros((*stack, target.rank, target.fan_out), np.float32)
    lost, whole = 0.0, 0.0
    for at in np.ndindex(stack):
        found = matrices.svd(after[at].astype(np.float64) - before[at].astype(np.float64))
        top = Svd(*(x[..., : target.rank] for x in found))
        a[at], b[at] = _shared(top, 1.0)
        lost += float((found.values[target.rank :] ** 2).sum())
        whole += float((found.values**2).sum())
    relative = (lost / whole) ** 0.5 if whole > 0 else 0.0
    factors = matrices.to_factors(target, jnp.asarray(a), jnp.asarray(b))
    return factors, Truncation(np.float64(lost**0.5), np.float64(relative))


def _shared(top: Svd, scale: float) -> tuple[Array, Array]:
    """Factors with `scale * a @ b` = left * values @ right^T, alike in norm."""
    root = np.sqrt(top.values / scale)
    return top.left * root, root[:, None] * top.right.T


def _like(old: Any, new: Any) -> Any:
    """`new` as an array of the same kind and in the same place as `old`."""
    if isinstance(old, jax.Array):
        return jax.device_put(new, old.sharding)
    return new


def _check_same(base: dict[str, Any], finetuned: dict[str, Any]) -> None:
    for path in (*base, *finetuned):
        if path not in base or path not in finetuned:
            where, other = ("base", finetuned) if path in base else ("fine-tuned", base)
            raise LoraError(
                f"only the {where} parameters have {path!r}; nearest in the others:\n"
                f"{listed(nearest(path, other))}\nPass two trees of one model, with the same root."
            )
        shapes = tuple(jnp.shape(base[path])), tuple(jnp.shape(finetuned[path]))
        if shapes[0] != shapes[1]:
            raise LoraError(
                f"{path!r} has shape {shapes[0]} in the base and {shapes[1]} in the fine-tuned "
                "parameters; pass two trees of one model"
            )
