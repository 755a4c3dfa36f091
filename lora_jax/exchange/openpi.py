"""Checkpoints of openpi, read only: base weights and LoRA factors in one tree of arrays.

adapter = openpi.load(restored["params"], f, params, *args)

    <layer>/w, <layer>/lora_a, <layer>/lora_b        attention, scaled by its alpha
    <layer>/<name>, <name>_lora_a, <name>_lora_b     MLPs, never scaled

W is [..., in, out], lora_a [..., in, rank], lora_b [..., rank, out]. An axis before these is, by
the layout, a stack, where each slice keeps its factors; an output (heads of a query), where they
are blocks of one update of rank `heads * rank`; or an input (heads of the output projection),
where openpi sums over `lora_a` and, apart from it, over `lora_b`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.adapters import Adapter
from lora_jax.errors import LoraError, near_paths
from lora_jax.exchange import tensor_file
from lora_jax.layout import Layout
from lora_jax.resolve import resolve
from lora_jax.spec import LoraSpec, Rule, Target
from lora_jax.updates import Factors

Pairs = dict[str, dict[str, np.ndarray]]  # lora_a and lora_b by the path of W


def load(
    checkpoint: Any,
    f: Callable[..., Any],
    params: Any,
    *args: Any,
    alpha: Mapping[str, float] | None = None,
    scaling: str = "alpha/r",
) -> Adapter:
    """Read the LoRA factors of a checkpoint of openpi, and the weights that it trained in full.

    Args:
      checkpoint: the tree of arrays, as Orbax restores it without openpi:
        `orbax.checkpoint.PyTreeCheckpointer().restore(folder)["params"]`.
      f, params, *args: the model without LoRA, with the weights that the run began from.
      alpha: the alpha of `lora_configs["attn"]` by a pattern of paths, `{"**/attn/*_1/w": 32.0}`.
        Without one it is the rank, as in openpi's own configs. openpi does not use the one of MLPs.
      scaling: "alpha/sqrt(r)" for `rslora=True`.

    Returns:
      The adapter. In `trainable` are the weights without factors that differ from `params`.

    Raises:
      LoraError: a parameter that the model does not have, arrays that do not fit, a pattern that
        matches no factors, or a frozen weight that is another one in `params`.
    """
    alphas, leaves = dict(alpha or {}), paths.flatten(params)
    pairs, values = _sorted(checkpoint, leaves)
    attention = [path for path in pairs if path.endswith("/w")]
    if idle := [pattern for pattern in alphas if not paths.matching(pattern, attention)]:
        near = near_paths(idle[0], attention)
        raise LoraError(f"alpha: {idle[0]!r} matches no factors of attention{near}")
    layout = resolve(LoraSpec(1, 1.0, tuple(map(Rule, pairs))), f, params, *args)
    targets, adapters = [], {}
    for target in layout.targets:
        factors = _factors(target, pairs[target.path])
        rank = pairs[target.path]["lora_a"].shape[-1]
        own = (a for pattern, a in alphas.items() if paths.match(pattern, target.path))
        scale = 1.0
        if target.path in attention and (given := next(own, None)) is not None:
            scale = dataclasses.replace(target, rank=rank, alpha=given, scaling=scaling).scale
        plain = target.plain(factors.a.shape[-1])
        targets.append(dataclasses.replace(plain, alpha=scale * plain.rank))
        adapters[target.path] = factors
    whole = {
        path: jnp.asarray(x)
        for path, x in values.items()  # openpi rounds to bfloat16 what it freezes
        if not np.array_equal(x, np.asarray(leaves[path]).astype(x.dtype))
    }
    if changed := sorted(whole.keys() & adapters):
        raise LoraError(
            f"{changed[0]!r} has factors, so openpi froze it, but params have another weight there:"
            " pass the weights that the run began from (its weight_loader)"
        )
    return Adapter(Layout(tuple(targets)), adapters, whole)


def _sorted(checkpoint: Any, leaves: Mapping[str, Any]) -> tuple[Pairs, dict[str, np.ndarray]]:
    """Return the factors by the path of their weight, and all other arrays by their own."""
    pairs, values = Pairs(), dict[str, np.ndarray]()
    for name, leaf in paths.flatten(checkpoint).items():
        x, path = np.asarray(leaf), name.removesuffix("/value")  # as NNX saves a variable
        tensor_file.check_finite("the checkpoint", name, x)
        stem, side = path[:-6], path[-6:]
        if is_factor := side in ("lora_a", "lora_b"):
            path = f"{stem}w" if stem.endswith("/") else stem.removesuffix("_")
        if path not in leaves:
            near = near_paths(path, leaves)
            raise LoraError(f"{name!r} of the checkpoint is of {path!r}, not in the model{near}")
        if is_factor:
            pairs.setdefault(path, {})[side] = x.astype(np.float32)
        else:
            values[path] = x
    return pairs, values


def _factors(target: Target, pair: Mapping[str, np.ndarray]) -> Factors:
    """Return factors of the same update, with the axes of the target."""
    *_, one, other = range(len(target.shape))
    a, b = (pair.get(side, np.zeros(0, np.float32)) for side in ("lora_a", "lora_b"))
    *before, inputs, outputs = target.shape
    expected = [(*before, inputs, a.shape[-1]), (*before, a.shape[-1], outputs)]
    if [a.shape, b.shape] != expected:
        raise LoraError(
            f"{target.path!r}: lora_a {a.shape}, lora_b {b.shape} do not fit; expected {expected}"
        )
    if one not in target.inputs or other not in target.outputs:
        raise LoraError(f"{target.path!r}: f uses it in another way than openpi; {target.form}")
    blocks = tuple(i for i in target.outputs if i != other)
    a = a.transpose(*target.stack, *target.inputs, *blocks, other)
    summed = tuple(i for i in target.inputs if i != one)
    b = b.sum(summed, keepdims=True).transpose(*target.stack, *summed, *blocks, one, other)
    count = int(np.prod(target.sizes(blocks)))
    plain = target.plain(count * a.shape[-1])
    b = b.reshape(*target.sizes(target.stack), count, b.shape[-2], -1)
    b = np.einsum("...hro,hk->...hrko", b, np.eye(count, dtype=b.dtype)).reshape(plain.b_shape)
    return Factors(jnp.asarray(a.reshape(plain.a_shape)), jnp.asarray(b))
