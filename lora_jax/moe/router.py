"""Mixtures of LoRA experts: the adapters of a stack, each example or token with its own blend.

With n adapters and gates g_1 ... g_n,

    y = x W + sum_i g_i * scale_i * (x a_i) b_i
      = x W + (g * scale * (x [a_1 ... a_n])) [b_1; ...; b_n]

so a mixture is one adapter of n times the rank, whose ranks are weighted in the middle: x W is
computed once, and the rest is two products whatever n is. The gates come from one of

    mix(stacked, weights)                 weights [n] for all, or [B, n], a row for each example:
    mix(stacked, gates(features @ r, 2))  say, from features of the example and a router r [d, n]
    route(stacked, router, top=2)         gates(x @ router[path]) for each token, from the input x
                                          of each product itself

and all are given to what `lora_jax.adapt` makes in the place of the adapters. The router's arrays
are a tree of their own, `{path: array}`; differentiate with respect to it, to the stack, or both.

An expert is saved as any adapter, and a router as trainable parameters of an empty one:

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
from lora_jax.multi.blend import Blend, Choosing
from lora_jax.multi.stack import Stack
from lora_jax.updates.gating import Gate
from lora_jax.updates.kind import Factors, kind_of

Router = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mixture(Choosing):
    """A stack and the weights of its adapters, as `lora_jax.adapt` takes them.

    weights: [n] for all, or [B, n], one row for each example.
    """

    stack: Stack
    weights: Any

    @property
    def per_example(self) -> bool:
        return jnp.ndim(self.weights) == 2

    def choice(self, layout: Layout) -> Any:
        return self.weights

    def blend(self, layout: Layout, choice: Any) -> Blend:
        return blend(layout, self.stack, choice)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed(Choosing):
    """A stack and a router per token, as `lora_jax.adapt` takes them.

    router: `{path: [*stack, *inputs, n]}`, the axes in the order of the factor `a`.
    top: how many experts a token gets; None: all.
    probe: None, or zeros `{path: [*stack, 2, n]}` of which the gradient counts the load
      (`lora_jax.moe.router_load` does it for you).
    """

    stack: Stack
    router: Router
    top: int | None = dataclasses.field(default=None, metadata={"static": True})
    probe: dict[str, Any] | None = None

    @property
    def per_example(self) -> bool:
        return False  # the gates differ by token, and the router is one for all

    def choice(self, layout: Layout) -> Any:
        return None

    def blend(self, layout: Layout, choice: Any) -> Blend:
        return blend_by_token(layout, self)


def mix(stacked: Stack, weights: Any) -> Mixture:
    """The adapters of a stack blended with given weights, of any sign; zeros are the base.

    Args:
      stacked: n adapters, from `lora_jax.multi.stack`.
      weights: [n] floats for all, or [B, n], a row for each example: each then runs as a batch of
        one, as in a mixed batch (see `lora_jax.adapt`). They may be traced and differentiated.

    Raises:
      LoraError: weights that are no floats or of another shape, a stack of DoRA adapters.

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
    """The adapters of a stack, blended for each token by a router at each target.

    A target's gates are `lora_jax.moe.gates(x @ router[path], top)`, x being what the program
    multiplies with W there (or the row looked up, of an embedding).

    Args:
      stacked: n adapters, from `lora_jax.multi.stack`.
      router: `{path: [*stack, *inputs, n]}` for each target, from `init_router`.
      top: how many experts each token gets, from 1 to n; None: all.

    Raises:
      LoraError: a stack of DoRA adapters, a router that does not fit the stack, a `top` that is
        not from 1 to n; and when it is used, a program that has no input x to route by: a product
        with W transposed or with a part of x, a weight that is folded, a `custom_jvp` or a sharded
        contraction in a `shard_map` that takes it.
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
                "adapter for each example (lora_jax.multi.select), or mix those of other kinds"
            )


def init_router(key: Any, layout: Layout, n: int) -> Router:
    """A router for n experts that hardly prefers any: `N(0, 0.01 / fan_in)` in float32.

    (Not zero: among equals `top` would choose the first ones, and only those would learn. The
    factor is that of Switch Transformers, arXiv 2101.03961, section 2.4.)

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


def blend(layout: Layout, stacked: Stack, weights: Any = None) -> Blend:
    """The stack as one adapter of n times the rank, weighted by `weights` [n] where given."""
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
    return Blend(factors, gains)


def _side_by_side(x: Any, axis: int) -> Any:
    """[n, ..., rank, ...] -> [..., n * rank, ...], the rank's axis being `axis` of the latter."""
    x = jnp.moveaxis(x, 0, axis)
    at = axis % x.ndim
    return x.reshape(*x.shape[:at], -1, *x.shape[at + 2 :])


def blend_by_token(layout: Layout, routed: Routed) -> Blend:
    """The same, with the router's columns beside those of `a`."""
    whole = blend(layout, routed.stack)
    gates = {}
    for t in layout.targets:
        a, b = whole.factors[t.path]
        router = jnp.asarray(routed.router[t.path])
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(a.dtype, router.dtype)
        a = jnp.concatenate([a.astype(dtype), router.astype(dtype)], axis=-1)
        whole.factors[t.path] = Factors(a, b)
        probe = None if routed.probe is None else routed.probe[t.path]
        gates[t.path] = Gate(routed.stack.size, routed.top, probe)
    return dataclasses.replace(whole, gates=gates)
