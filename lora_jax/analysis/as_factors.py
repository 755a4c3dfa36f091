"""Updates of any kind as plain factors, the form that every analysis takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lora_jax import paths
from lora_jax.adapters import Adapter, Adapters, as_lora, check
from lora_jax.analysis import matrices
from lora_jax.base import dense
from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.spec import Target
from lora_jax.updates.factors import Factors
from lora_jax.updates.kind import kind_of


def as_factors(layout: Layout, adapters: Adapters, params: Any = None) -> Adapter:
    """Return the adapter with plain factors at every target, whose product is the update.

    Additive kinds have them (`lora_jax.as_lora`). The update of DoRA is the change that merging
    makes, W' - W, which usually has full rank. It is decomposed, and needs `params`.

    Raises:
      LoraError: adapters that do not fit the layout, DoRA without parameters, or a bias.
    """
    check(layout, adapters)
    leaves = None if params is None else paths.flatten(params)
    if leaves is not None:
        layout.check_params(leaves)
    found = {}
    for target in layout.targets:
        own = adapters[target.path]
        if kind_of(target).rescales:
            w = None if leaves is None else leaves[target.path]
            found[target.path] = _difference(target, own, w)
        else:
            one, factors = as_lora(Layout((target,)), {target.path: own})
            found[target.path] = one.targets[0], factors[target.path]
    whole = Layout(tuple(target for target, _ in found.values()))
    return Adapter(whole, {path: factors for path, (_, factors) in found.items()})


def factors_of(target: Target, parameters: Any) -> Factors:
    """Return the factors `a` and `b` of an update, before any rescaling."""
    factors = kind_of(target).factors(target, parameters)
    if factors is None:
        raise LoraError(
            f"{target.path!r}: an update of the kind {target.kind!r} has no factors and no "
            "directions; leave it out: layout.subset(patterns)"
        )
    return factors


def _difference(target: Target, parameters: Any, w: Any) -> tuple[Target, Factors]:
    if w is None:
        raise LoraError(
            f"{target.path!r}: the update of the kind {target.kind!r} depends on W; pass the base "
            "parameters (params=)"
        )
    w = matrices.host(dense(w)).astype(np.float32)
    merged = kind_of(target).merged(target, parameters, w)
    found = matrices.svd(matrices.of_weight(target, merged - w).astype(np.float64))
    whole = target.plain(min(target.fan_in, target.fan_out))
    root = np.sqrt(found.values)
    a, b = found.left * root[..., None, :], root[..., :, None] * found.right.mT
    return dataclasses.replace(whole, fold=target.fold), matrices.to_factors(whole, a, b)
