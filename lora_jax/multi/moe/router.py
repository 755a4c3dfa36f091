"""Mixtures of LoRA experts: the adapters of a stack, blended for each example or token.

With n adapters and gates g_1 ... g_n,

    y = x W + sum_i g_i * scale_i * (x a_i) b_i
      = x W + (g * scale * (x [a_1 ... a_n])) [b_1; ...; b_n]

So a mixture is one adapter of n times the rank, whose ranks are weighted in the middle: x W is
computed once, and the rest is two products for any n. The gates come from one of

    mix(stacked, weights)                 weights [n] for all examples, or [B, n], one row for each
    mix(stacked, gates(features @ r, 2))  for example, from features of the example and a router
                                          r [d, n]
    route(stacked, router, top=2)         gates(x @ router[path]) for each token, from the input x
                                          of each product itself

Pass the result in the place of the adapters to the function that `lora_jax.adapt` returns. The
router's arrays are a tree of their own, `{path: array}`: differentiate with respect to the router,
the stack, or both.

An expert is saved like any adapter, and a router as trainable parameters of an empty one:

    lora_jax.save(folder / "0", (layout_0, lora_jax.multi.unstack(layout_0, stacked, 0)))
    lora_jax.save(folder / "router", Adapter(Layout(), {}, router), about={"top": 2})
    router = lora_jax.restore(folder / "router").trainable
"""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.multi.selected import Choice, Mixed, Stack
from lora_jax.transform import UpdateOf
from lora_jax.updates.factors import Factors
from lora_jax.updates.kind import kind_of

Router = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture(Choice):
    """A stack and the weights of its adapters, as `lora_jax.adapt` takes them.

    Attributes:
      stack: the experts.
      weights: [n] for all examples, or [B, n], one row for each.
    """

    stack: Stack
    weights: Any

    @property
    def per_example(self) -> bool:
        """Whether each example has weights of its own."""
        return jnp.ndim(self.weights) == 2

    def choice(self, layout: Layout) -> Any:
        return self.weights

    def updates(self, layout: Layout, choice: Any) -> UpdateOf:
        return mixed(layout, self.stack, choice)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed(Choice):
    """A stack and a router per token, as `lora_jax.adapt` takes them.

    Attributes:
      stack: the experts.
      router: `{path: [*stack, *inputs, n]}`, with the axes in the order of the factor `a`.
      top: the number of experts for each token; None: all.
      probe: None, or zeros `{path: [*stack, 2, n]}` whose gradient counts the load
        (`lora_jax.moe.router_load` does it for you).
    """

    stack: Stack
    router: Router
    top: int | None = dataclasses.field(default=None, metadata={"static": True})
    probe: dict[str, Any] | None = None

    def updates(self, layout: Layout, choice: Any) -> UpdateOf:
        whole = mixed(layout, self.stack)  # and the router's columns after the columns of `a`
        for t in layout.targets:
            a, b = whole.factors[t.path]
            router = jnp.asarray(self.router[t.path])
            with jax.numpy_dtype_promotion("standard"):
                dtype = jnp.promote_types(a.dtype, router.dtype)
            a = jnp.concatenate([a.astype(dtype), router.astype(dtype)], axis=-1)
            whole.factors[t.path] = Factors(a, b)
            probe = None if self.probe is None else self.probe[t.path]
            whole.gates[t.path] = {"experts": self.stack.size, "top": self.top, "probe": probe}
        return whole


def mix(stacked: Stack, weights: Any) -> Mixture:
    """Return the adapters of a stack blended with given weights.

    Weights may have any sign; if all are zero, the result is the base.

    Args:
      stacked: n adapters, from `lora_jax.multi.stack`.
      weights: [n] floats for all examples, or [B, n], one row for each. In the second case each
        example runs as a batch of one, as in a mixed batch (see `lora_jax.adapt`). They may be
        traced and differentiated.

    Returns:
      A value for the place of the adapters in the function that `lora_jax.adapt` returns.

    Raises:
      LoraError: weights that are not floats or have another shape, or a stack of DoRA adapters.

    >>> import lora_jax
    >>> f = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
    >>> layout = lora_jax.resolve(lora_jax.LoraSpec(1, 1.0, "w"), f, params, x)
    >>> one = {"w": Factors(jnp.ones((4, 1)), jnp.ones((1, 3)))}
    >>> two = {"w": Factors(jnp.ones((4, 1)), 10 * jnp.ones((1, 3)))}
    >>> both, stacked = lora_jax.multi.stack([(layout, one), (layout, two)])
    >>> g = lora_jax.adapt(both, f)
    >>> g(params, mix(stacked, [0.5, 0.5]), x)[:, 0].tolist()
    [26.0, 26.0]
    >>> g(params, mix(stacked, [[1.0, 0.0], [0.0, 2.0]]), x)[:, 0].tolist()
    [8.0, 84.0]
    """
    _check_additive(stacked)
    weights = jnp.asarray(weights)
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise LoraError(
            f"the weights of a mixture are floats, got {weights.dtype}; for one adapter by its "
            "number it is lora_jax.multi.select"
        )
    if weights.ndim not in (1, 2) or weights.shape[-1] != stacked.size:
        raise LoraError(
            f"the stack holds {stacked.size} adapters, so the weights must be [{stacked.size}] or "
            f"[examples, {stacked.size}]; got {list(weights.shape)}"
        )
    return Mixture(stacked, weights.astype(jnp.float32))


def route(stacked: Stack, router: Router, top: int | None = None) -> Routed:
    """Return the adapters of a stack, blended for each token by a router at each target.

    A target's gates are `lora_jax.moe.gates(x @ router[path], top)`, where x is the array that the
    program multiplies with W (or, for an embedding, the row that it looks up).

    Args:
      stacked: n adapters, from `lora_jax.multi.stack`.
      router: `{path: [*stack, *inputs, n]}` for each target, from `init_router`.
      top: the number of experts for each token, from 1 to n; None: all.

    Returns:
      A value for the place of the adapters in the function that `lora_jax.adapt` returns.

    Raises:
      LoraError: a stack of DoRA adapters, a router that does not fit the stack, or a `top` out of
        range. When it is used: a program that has no input x to route by, which is a product with W
        transposed or with a part of x, a weight that is folded, or a weight inside a `custom_jvp`
        or a sharded contraction of a `shard_map`.
    """
    _check_additive(stacked)
    n = stacked.size
    if top is not None and not 1 <= top <= n:
        raise LoraError(f"top must be from 1 to {n}, the number of experts, or None; got {top}")
    for path in (*router, *stacked.factors):
        if path not in router or path not in stacked.factors:
            where, other = ("stack", stacked.factors) if path in router else ("router", router)
            raise LoraError(
                f"the {where} has no {path!r}; nearest in it:\n{listed(nearest(path, other))}\n"
                "a router has one array for each target: lora_jax.moe.init_router(key, layout, n)"
            )
        want = (*stacked.factors[path].a.shape[1:-1], n)
        if tuple(jnp.shape(router[path])) != want:
            raise LoraError(
                f"the router of {path!r} has the shape {tuple(jnp.shape(router[path]))}, for "
                f"{n} experts it must be {want}: the axes of `a`, with n in the place of the rank"
            )
    return Routed(stacked, dict(router), top)


def _check_additive(stacked: Stack) -> None:
    for path, parameters in stacked.factors.items():
        if not isinstance(parameters, Factors):
            raise LoraError(
                f"{path!r}: the stack holds {type(parameters).__name__}, whose update rescales W "
                "itself (DoRA), so that updates do not add up and cannot be mixed. Choose one "
                "adapter for each example (lora_jax.multi.select), or mix adapters of other kinds"
            )


def init_router(key: Any, layout: Layout, n: int) -> Router:
    """Return a router for n experts with almost no preference: `N(0, 0.01 / fan_in)` in float32.

    It is not zero, because `top` would then choose the first experts, and only they would learn.

    Args:
      key: a PRNG key.
      layout: the layout of the stack.
      n: the number of experts.

    Returns:
      `{path: [*stack, *inputs, n]}`.

    Source:
      The factor 0.01 is that of Switch Transformers, arXiv 2101.03961, section 2.4.

    >>> import lora_jax
    >>> layout = Layout((lora_jax.Target("w", (5, 8, 3), (0,), (1,), (2,), rank=2, alpha=2.0),))
    >>> jax.tree.map(jnp.shape, init_router(jax.random.key(0), layout, n=4))
    {'w': (5, 8, 4)}
    """
    return {
        t.path: jax.random.normal(
            jax.random.fold_in(key, zlib.crc32(t.path.encode())), (*t.a_shape[:-1], n)
        )
        * (0.01 / t.fan_in) ** 0.5
        for t in layout.targets
    }


def mixed(layout: Layout, stacked: Stack, weights: Any = None) -> Mixed:
    """Return the stack as one adapter of n times the rank, weighted by `weights` [n] if given."""
    factors, gains = {}, {}
    for t in layout.targets:
        if t.path not in stacked.factors:
            raise LoraError(
                f"the layout adapts {t.path!r}, but the stack does not; use the layout that "
                "lora_jax.multi.stack gave with it"
            )
        a, b = stacked.factors[t.path]
        kind_of(t).check_parameters(
            t, Factors(*(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (a, b)))
        )
        factors[t.path] = Factors(_side_by_side(a[:-1], -2), _side_by_side(b[:-1], len(t.stack)))
        scales = stacked.scales[t.path][:-1]
        gains[t.path] = jnp.repeat(scales if weights is None else scales * weights, t.rank)
    return Mixed(factors, gains)


def _side_by_side(x: Any, axis: int) -> Any:
    """Map [n, ..., rank, ...] to [..., n * rank, ...], with the rank at `axis` of the result."""
    x = jnp.moveaxis(x, 0, axis)
    at = axis % x.ndim
    return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])
