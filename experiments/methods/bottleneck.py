"""Bottleneck adapter layers: x + up(activation(down(x))) on the outputs of some modules.

Houlsby et al. (arXiv 1902.00751), Pfeiffer et al. (2005.00247), Lin et al. (2004.03829).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.module import InterceptorContext
from flax.traverse_util import unflatten_dict
from jax import Array

from experiments.methods.sites import Tree

_ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu}
_INITIAL = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """An adapter layer at each of some modules of a Linen model.

    Under the path of each module, the parameters are `down/{kernel [d, r], bias [r]}`,
    `up/{kernel [r, d], bias [d]}` and, with `norm`, `norm/{scale, bias} [d]`, all float32. `up` is
    zero at the start, so that the model equals the base.

    Attributes:
      sites: paths of the modules whose output goes through an adapter layer. If an output is a
        tuple, its first entry does.
      width: d, the last axis of these outputs.
      size: r, the width of the bottleneck.
      activation: the activation function in the bottleneck.
      norm: whether `down` is preceded by a layer norm of its own (Lin's Adapter^L).
      epsilon: the epsilon of that norm.
    """

    sites: tuple[str, ...]
    width: int
    size: int
    activation: Literal["relu", "gelu"] = "relu"
    norm: bool = False
    epsilon: float = 1e-5

    def init(self, key: Array) -> Tree:
        """Return fresh parameters, nested by the paths of the modules."""
        layers = {
            site: self._layer(jax.random.fold_in(key, index))
            for index, site in enumerate(self.sites)
        }
        return unflatten_dict(layers, sep="/")

    def _layer(self, key: Array) -> Tree:
        d, r = self.width, self.size
        layer = {
            "down": {"kernel": _INITIAL(key, (d, r), jnp.float32), "bias": jnp.zeros(r)},
            "up": {"kernel": jnp.zeros((r, d)), "bias": jnp.zeros(d)},
        }
        return (
            {**layer, "norm": {"scale": jnp.ones(d), "bias": jnp.zeros(d)}} if self.norm else layer
        )

    def layer(self, params: Mapping[str, Any], x: Array) -> Array:
        """Apply one adapter layer to x [B, T, D], the output of a module, in the dtype of x."""
        h = _normed(params["norm"], x, self.epsilon) if self.norm else x
        h = _ACTIVATIONS[self.activation](_dense(params["down"], h))
        return x + _dense(params["up"], h)

    def around(self, params: Tree) -> AbstractContextManager[None]:
        """Return a context manager in which calls of the model go through the adapter layers."""
        here = {site: _at(params, site) for site in self.sites}

        def through(call: Any, args: Any, kwargs: Any, context: InterceptorContext) -> Any:
            out = call(*args, **kwargs)
            if context.method_name != "__call__":
                return out
            own = here.get("/".join(context.module.path))
            if own is None:
                return out
            if isinstance(out, tuple):  # a decoder's attention also returns its cache
                return (self.layer(own, out[0]), *out[1:])
            return self.layer(own, out)

        return nn.intercept_methods(through)


def _at(tree: Tree, path: str) -> Tree:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _dense(params: Mapping[str, Array], x: Array) -> Array:
    kernel, bias = (params[name].astype(x.dtype) for name in ("kernel", "bias"))
    return jnp.einsum("btd,df->btf", x, kernel) + bias[None, None]


def _normed(params: Mapping[str, Array], x: Array, epsilon: float) -> Array:
    """Apply layer normalisation, with statistics in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    return (normed * params["scale"][None, None] + params["bias"][None, None]).astype(x.dtype)
