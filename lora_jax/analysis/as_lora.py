"""Updates of any kind as plain LoRA: exactly if they are of low rank, otherwise the nearest."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.adapters import Adapter, Adapters, as_factors, check
from lora_jax.analysis import matrices
from lora_jax.analysis.decompose import nearest_factors
from lora_jax.base import dense
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.multi.combine import Truncation, truncate
from lora_jax.spec import Target, check_rank
from lora_jax.updates.factors import Factors
from lora_jax.updates.kind import kind_of


class PlainLora(NamedTuple):
    """An update as plain LoRA. It unpacks: `layout, adapters, errors = as_lora(...)`.

    Attributes:
      layout: every target has the kind "lora" and no parts.
      adapters: the factors.
      errors: `{path: Truncation}`, the part of each target's update that the factors do not hold.
    """

    layout: Layout
    adapters: Adapters
    errors: dict[str, Truncation]


def as_lora(
    layout: Layout,
    adapters: Adapters,
    rank: int | None = None,
    params: Any = None,
    onto: Any = None,
) -> PlainLora:
    """Return the same update with plain factors at every target, at a rank of at most `rank`.

    LoHa, LoKr, VeRA and parts of a fused weight are low-rank updates of a higher rank. Their
    factors are exact, and can be stacked, mixed and exported like any LoRA adapter. A target that
    is plain LoRA already stays as it is. If the rank would exceed min(in, out), the smaller of the
    two factors becomes an identity. A lower `rank` is the nearest in the Frobenius norm.

    The update of DoRA, and of other kinds that rescale W, depends on W. It is the change that
    merging makes, W' - W, which usually has full rank; `matrices.top_svd` decomposes it.

    Args:
      layout: from `lora_jax.resolve` or `lora_jax.restore`.
      adapters: the adapter tree of that layout.
      rank: the highest rank of a target; None: the rank that holds the update exactly.
      params: the base parameters that the adapters were trained on, for kinds that rescale W.
      onto: the parameters to which the factors will be added, if they are not `params`: then the
        factors are the nearest to W' - onto. Pass the original weights of a base that PiSSA or
        LoftQ has changed (`lora_jax.init_from_base`), or that was quantised. None: `params`.

    Returns:
      `PlainLora(layout, adapters, errors)`.

    Raises:
      LoraError: adapters that do not fit the layout or the parameters, a kind that rescales W
        without `params`, a bias (it has no factors), or a rank below 1.

    >>> import jax, lora_jax
    >>> layout = Layout((Target("w", (9, 8), (), (0,), (1,), rank=2, alpha=1.0, kind="loha"),))
    >>> plain, adapters, errors = as_lora(layout, lora_jax.init(jax.random.key(0), layout))
    >>> plain["w"].kind, plain["w"].rank, adapters["w"].a.shape, float(errors["w"].error)
    ('lora', 4, (9, 4), 0.0)
    """
    check(layout, adapters)
    if rank is not None:
        check_rank(rank, "as_lora")
    if onto is not None and params is None:
        raise LoraError("as_lora with onto= needs params=, which the adapters were trained on")
    before, after = ({} if x is None else paths.flatten(x) for x in (onto, params))
    for leaves in filter(None, (before, after)):
        layout.check_params(leaves)
    targets, factors, errors = [], {}, {}
    for target in layout.targets:
        path, own = target.path, adapters[target.path]
        if target.inputs and after and (before or kind_of(target).rescales):
            target, factors[path], errors[path] = _difference(
                target, own, after[path], (before or after)[path], rank
            )
        else:
            one = Adapter(*as_factors(Layout((target,)), {path: own}))
            limit = one.layout[path].rank if rank is None else rank
            (found, arrays, _), cut = truncate(one, limit)
            target, factors[path], errors[path] = found[path], arrays[path], cut[path]
        targets.append(target)
    return PlainLora(Layout(tuple(targets)), factors, errors)


def _difference(
    target: Target, parameters: Any, w: Any, onto: Any, rank: int | None
) -> tuple[Target, Factors, Truncation]:
    """Return the best factors of `W' - onto`, formed in float32."""
    wide = jnp.asarray(dense(w)).astype(jnp.float32)
    merged = kind_of(target).merged(target, parameters, wide)
    after, before = (matrices.of_weight(target, x).astype(np.float32) for x in (merged, onto))
    return nearest_factors(target, before, after, target.fan_in if rank is None else rank)


def factors_of(target: Target, parameters: Any) -> Factors:
    """Return the factors `a` and `b` of an update, before any rescaling."""
    factors = kind_of(target).factors(target, parameters)
    if factors is None:
        raise LoraError(
            f"{target.path!r}: an update of the kind {target.kind!r} has no factors and no "
            "directions; leave it out: layout.subset(patterns)"
        )
    return factors
