"""Amplification: which of W's directions an update amplifies (paper 7.3, Table 7)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from lora_jax import paths
from lora_jax.adapters import Adapters
from lora_jax.analysis import matrices
from lora_jax.analysis.as_lora import as_lora
from lora_jax.analysis.matrices import Array, Svd
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.spec import Target


class Amplification(NamedTuple):
    """The amplification of one target; each array is [*stack].

    U and V hold the top r singular vectors of the matrix that a field names.

    Attributes:
      update: ||D||_F of the update D = scale * a @ b.
      weight: ||W||_F.
      along_update: ||U^T W V||_F with the directions of D: the part of W in these directions.
      along_weight: the same with the directions of W's r largest singular values, which is the
        largest value that any r directions can give.
      along_random: the root of the mean of the squares over all random directions.
      factor: update / along_update, the amplification factor of the paper; NaN if D is zero.
    """

    update: Array
    weight: Array
    along_update: Array
    along_weight: Array
    along_random: Array
    factor: Array


def amplification(
    layout: Layout, params: Any, adapters: Adapters, rank: int | None = None
) -> dict[str, Amplification]:
    """Return Table 7 for every target: W projected on the update's, its own, and random directions.

    For random orthonormal U [in, r] and V [out, r], the mean of ||U^T W V||_F^2 is known to be (r /
    in)(r / out) ||W||_F^2, since E[U U^T] = r / in. So nothing is drawn at random. (The paper's
    draw for W_q of GPT-3, 0.02, is its 4 * 61.95 / 12288.)

    Args:
      layout, adapters: a trained adapter, of any kind that has factors.
      params: the base parameters; one matrix at a time is read.
      rank: the number of directions, at most the target's rank, which is the default.

    Returns:
      `{path: Amplification}`. Directions of the update that do not exist (singular values lost in
      rounding) count as zero. If min(in, out) is above 1,024, products with W are float32 and
      `along_weight` is computed iteratively, to a relative error of about 1e-3: see
      `lora_jax.analysis.matrices.top_svd`.

    Raises:
      LoraError: the layout does not fit the parameters or the adapters, or a rank out of range.

    Source:
      Section 7.3 and Table 7 of arXiv 2106.09685.

    >>> import jax.numpy as jnp
    >>> from lora_jax import Factors
    >>> layout = Layout((Target("w", (3, 3), (), (0,), (1,), rank=1, alpha=6.0),))
    >>> w, e1 = jnp.diag(jnp.array([5.0, 2.0, 1.0])), jnp.eye(3)[1]
    >>> found = amplification(layout, {"w": w}, {"w": Factors(e1[:, None], e1[None])})["w"]
    >>> [float(x) for x in (found.update, found.along_update, found.along_weight, found.factor)]
    [6.0, 2.0, 5.0, 3.0]
    """
    leaves = paths.flatten(params)
    layout.check_params(leaves)
    plain, factors, _ = as_lora(layout, adapters, params=params)
    out = {}
    for target in layout.targets:
        wanted = target.rank if rank is None else rank
        if not 1 <= wanted <= target.rank:
            raise LoraError(
                f"{target.path!r}: its update has {target.rank} directions, got rank={rank}; "
                f"pass a rank from 1 to {target.rank}"
            )
        found = matrices.update_svd(plain[target.path], factors[target.path])
        weight = matrices.of_weight(target, leaves[target.path])
        out[target.path] = _of_target(target, weight, found, wanted)
    return out


def _of_target(target: Target, weight: Any, found: Svd, rank: int) -> Amplification:
    stack = weight.shape[:-2]
    norm, along, own = np.zeros(stack), np.zeros(stack), np.zeros(stack)
    exist = matrices.defined(found.values)
    for at in np.ndindex(stack):
        w = matrices.wide(weight[at])
        keep = exist[at][:rank]
        left, right = found.left[at][:, :rank][:, keep], found.right[at][:, :rank][:, keep]
        norm[at] = np.linalg.norm(w)
        along[at] = np.linalg.norm(left.T @ (w @ right.astype(w.dtype)))
        own[at] = np.linalg.norm(matrices.top_values(w, rank))
    update = np.linalg.norm(found.values, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = update / along
    random = rank * norm / np.sqrt(target.fan_in * target.fan_out)
    return Amplification(update, norm, along, own, random, factor)
