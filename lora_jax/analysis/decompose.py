"""Low-rank factors of the difference that a full fine-tuning made."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.adapters import Adapter
from lora_jax.analysis import matrices
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.multi.combine import Truncation
from lora_jax.spec import Target, check_rank
from lora_jax.updates.factors import Factors


class Extraction(NamedTuple):
    """The best adapter of a full fine-tuning, and the part that it leaves out.

    Attributes:
      adapter: an ordinary adapter, of scale 1.
      truncation: `{path: Truncation}`, the norm of the singular values that were cut off, over the
        whole stack, and relative to the whole difference.
      untargeted: `{path: norm}`, the norm of the difference of every parameter that changed and is
        not a target: biases, norms, matrices outside of the layout. No adapter of this layout can
        hold them.
    """

    adapter: Adapter
    truncation: dict[str, Truncation]
    untargeted: dict[str, float]


def extract(layout: Layout, base: Any, finetuned: Any, rank: int | None = None) -> Extraction:
    """Return the adapter of at most `rank` that is nearest to `finetuned - base`, in every target.

    It is the truncated singular value decomposition of the difference. So no adapter of that rank
    is nearer in the Frobenius norm (Eckart and Young, 1936). The error is measured. If min(in, out)
    is above 1,024, the largest singular values are computed iteratively, and nearest to within a
    thousandth: see `lora_jax.analysis.matrices.top_svd`.

    Args:
      layout: from `lora_jax.resolve` on the model: the parameters and the roles of their axes.
      base, finetuned: parameter trees of the same structure and shapes.
      rank: of every target; None: each has its own rank from the layout.

    Returns:
      The adapter, the error of each target, and the changes that no target holds.

    Raises:
      LoraError: trees that differ in structure or shapes, a layout that does not fit them, or a
        rank out of range.

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
        path = target.path
        w, tuned = (matrices.of_weight(target, tree[path]) for tree in (before, after))
        found = nearest_factors(target, w, tuned, target.rank if rank is None else rank)
        target, adapters[path], cuts[path] = found
        targets.append(target)
    moved = {
        path: float(np.linalg.norm(matrices.host(after[path]) - matrices.host(before[path])))
        for path in before
        if path not in adapters
    }
    untargeted = {path: norm for path, norm in moved.items() if norm != 0}
    return Extraction(Adapter(Layout(tuple(targets)), adapters), cuts, untargeted)


def nearest_factors(
    target: Target, before: Any, after: Any, rank: int
) -> tuple[Target, Factors, Truncation]:
    """Return the factors of at most `rank` that are nearest to `after - before`, [*stack, in, out].

    The error is measured on the factors as they are stored, in float32.
    """
    rank = min(rank, target.fan_in, target.fan_out)
    target = dataclasses.replace(target.plain(rank), fold=target.fold)
    stack = before.shape[:-2]
    a = np.zeros((*stack, target.fan_in, rank), np.float32)
    b = np.zeros((*stack, rank, target.fan_out), np.float32)
    lost, whole = 0.0, 0.0
    for at in np.ndindex(stack):
        change = matrices.wide(after[at]) - matrices.wide(before[at])
        a[at], b[at] = matrices.shared(matrices.top_svd(change, rank), 1.0)
        left = change - a[at].astype(change.dtype) @ b[at].astype(change.dtype)
        lost += float((left.astype(np.float64) ** 2).sum())
        whole += float((change.astype(np.float64) ** 2).sum())
    relative = (lost / whole) ** 0.5 if whole > 0 else 0.0
    factors = matrices.to_factors(target, jnp.asarray(a), jnp.asarray(b))
    return target, factors, Truncation(np.float64(lost**0.5), np.float64(relative))


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
