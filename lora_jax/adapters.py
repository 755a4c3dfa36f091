"""The adapter tree, `{path: parameters}`: a plain pytree that holds arrays and nothing else.

`merge` is the definition of an update, `W + scale * a @ b` for LoRA. `lora_jax.adapt` is the fast
path, tested to be equal to it.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.spec import LoraSpec, Target
from lora_jax.updates.factors import Factors
from lora_jax.updates.kind import Initializer, kind_of
from lora_jax.updates.kind import uniform as uniform_within

Adapters = dict[str, Any]
"""`{path: parameters}`, where `parameters` is the NamedTuple of arrays of the target's kind."""


ELSEWHERE = {
    "pissa": "lora_jax.init_from_base(layout, params, 'pissa'), which gives a new base too",
    "olora": "lora_jax.init_from_base(layout, params, 'olora'), which gives a new base too",
    "loftq": "lora_jax.init_from_base(layout, params, 'loftq'), which gives a new base too",
    "eva": "lora_jax.init_from_inputs(key, layout, f, params, batches), which needs real batches",
}


def gaussian(key: jax.Array, target: Target, dtype: Any) -> jax.Array:
    """Draw from N(0, 1/fan_in), where fan_in is the product of the target's input axes."""
    return jax.random.normal(key, target.a_shape, dtype) / math.sqrt(target.fan_in)


def uniform(key: jax.Array, target: Target, dtype: Any) -> jax.Array:
    """Draw from U(-s, s) with s = 1/sqrt(fan_in): kaiming_uniform_(a=sqrt(5)) of loralib and PEFT.

    Its variance is a third of that of N(0, 1/fan_in).
    """
    return uniform_within(key, target.a_shape, dtype, target.fan_in)


def orthogonal(key: jax.Array, target: Target, dtype: Any) -> jax.Array:
    """Draw orthonormal columns: at right angles, and on average as long as with N(0, 1/fan_in).

    Each slice of a stacked parameter has its own. (PEFT's "orthogonal" is another method: it
    draws `a` and `b` from one orthogonal matrix, so that `b` is not zero but `a b` is.)
    """
    stack = math.prod(target.sizes(target.stack))
    flat = jax.nn.initializers.orthogonal()
    keys = jax.random.split(key, stack)
    drawn = jax.vmap(lambda key: flat(key, (target.fan_in, target.rank), dtype))(keys)
    return drawn.reshape(target.a_shape)


INITIALIZERS: dict[str, Initializer] = {
    "gaussian": gaussian,
    "uniform": uniform,
    "orthogonal": orthogonal,
}


class Adapter(NamedTuple):
    """One adapter: everything that is saved, stacked or passed on together.

    It unpacks: `layout, adapters, trainable = lora_jax.restore(path)`. A function that takes an
    `Adapter` also takes a plain tuple `(layout, adapters)`.

    Attributes:
      layout: which parameters are adapted, and the roles of their axes.
      parameters: `{path: Factors(a, b)}`, in the layout's shapes. A kind other than LoRA has a
        NamedTuple of its own.
      trainable: `{path: array}`, base parameters that were trained in full with the factors, such
        as a new head (PEFT's `modules_to_save`). Put them into the parameter tree with
        `lora_jax.paths.replace(params, adapter.trainable)`.
    """

    layout: Layout
    parameters: Adapters
    trainable: Mapping[str, Any] = {}


def init(
    key: jax.Array,
    layout: Layout,
    *,
    method: str | Initializer = "gaussian",
    params: Any = None,
    dtype: Any = jnp.float32,
) -> Adapters:
    """Return fresh adapters: `a` is random and `b` zero, so that the first output is the base's.

    Args:
      key: a PRNG key. Each target draws from the key folded with its own path, so that adding
        a target does not change the others.
      layout: from `lora_jax.resolve`.
      method: how `a` is drawn: "gaussian", N(0, 1/fan_in); "uniform", within 1/sqrt(fan_in), as
        in loralib and PEFT; "orthogonal", with orthonormal columns; or a function
        `(key, target, dtype) -> array of target.a_shape`. For PiSSA, OLoRA and LoftQ, which
        change the base, use `lora_jax.init_from_base`. For EVA, which reads batches, use
        `lora_jax.init_from_inputs`.
      params: the base parameters. Only a kind whose first values depend on W needs them, such as
        DoRA with its magnitude.
      dtype: of the adapters. Keep float32 also over a bfloat16 base: these are the arrays that
        the optimizer updates, and they are cast where they are used.

    Returns:
      `{path: Factors(a, b)}` in the layout's order. Another kind has its own NamedTuple
      (`lora_jax.updates`). Every update is zero.

    Raises:
      LoraError: an unknown method, a kind that needs the parameters and gets none, or parameters
        that do not fit the layout.

    Source:
      Section 4.1 of arXiv 2106.09685.

    >>> from lora_jax.spec import Target
    >>> layout = Layout((Target("w", (8, 4), (), (0,), (1,), rank=2, alpha=4.0),))
    >>> jax.tree.map(jnp.shape, init(jax.random.key(0), layout))
    {'w': Factors(a=(8, 2), b=(2, 4))}
    """
    a_init = initializer(method)
    leaves = {} if params is None else paths.flatten(params)
    if params is not None:
        layout.check_params(leaves)
    out: Adapters = {}
    for target in layout.targets:
        own = jax.random.fold_in(key, zlib.crc32(target.path.encode()))
        w = leaves.get(target.path)
        out[target.path] = kind_of(target).init(own, target, dtype, a_init, w)
    return out


def initializer(method: str | Initializer) -> Initializer:
    """Return the function that draws `a`, for a method given by name or as a function.

    Raises:
      LoraError: a name that is not in `INITIALIZERS`.
    """
    if not isinstance(method, str):
        return method
    if method not in INITIALIZERS:
        cure = ELSEWHERE.get(method, "a function (key, target, dtype) -> array of target.a_shape")
        raise LoraError(
            f"lora_jax.init has no method {method!r}; it has {', '.join(INITIALIZERS)}. Use {cure}"
        )
    return INITIALIZERS[method]


def count(adapters: Any) -> int:
    """Return the number of array elements in an adapter tree.

    Args:
      adapters: the adapter tree, or any other pytree of arrays.

    Returns:
      The sum of the sizes of its leaves.
    """
    return sum(math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(adapters))


def check(layout: Layout, adapters: Adapters) -> None:
    """Raise `LoraError` unless `adapters` hold exactly the layout's targets, in its shapes."""
    if not isinstance(adapters, dict):
        raise LoraError(
            f"adapters must be a dict of path -> arrays, got {type(adapters).__name__}; "
            "the argument order is g(params, adapters, ...) and merge(layout, params, adapters)"
        )
    wanted = {t.path for t in layout.targets}
    for path in adapters:
        if path not in wanted:
            raise LoraError(
                f"the adapters hold {path!r}, which the layout does not; nearest in the "
                f"layout:\n{listed(nearest(path, wanted))}\n"
                "Use the layout that was saved with these adapters (lora_jax.restore)."
            )
    for target in layout.targets:
        if target.path not in adapters:
            raise LoraError(
                f"the layout adapts {target.path!r}, but the adapters have no factors for it; "
                "use lora_jax.init(key, layout) or the layout saved with these adapters"
            )
        kind_of(target).check_parameters(target, adapters[target.path])


def merge(layout: Layout, params: Any, adapters: Adapters) -> Any:
    """Return the parameters with every update added: `W + (alpha / rank) * a @ b`.

    The sum is formed in float32 (or in W's dtype if that is wider) and rounded once to W's dtype.
    There is no unmerge: subtracting does not restore a low-precision W, so keep the base.

    **A quantised base** can be merged in two ways. `params` decides which:

        merge(layout, quantised, adapters)   into the dequantised weights. The adapters were trained
                                             on these, so this is the model that was trained.
        merge(layout, original, adapters)    into the weights before they were quantised. This is
                                             another model; `merge_error` measures the difference.

    In both cases the merged leaves are float arrays: nothing is quantised again.

    Args:
      layout: from `lora_jax.resolve` or `lora_jax.restore`.
      params: the base parameters, a pytree; it is not changed.
      adapters: `{path: Factors(a, b)}`, or the arrays of another kind.

    Returns:
      A pytree like `params`, with the same shapes and dtypes. A target that was a quantised `Base`
      becomes an array; a quantised leaf that is not a target stays as it is.

    Raises:
      LoraError: the layout does not fit the parameters, or the adapters do not fit the layout.

    Source:
      Section 4.1 of arXiv 2106.09685: W0 + B A.

    >>> import jax.numpy as jnp, lora_jax
    >>> from lora_jax import Factors
    >>> params = {"w": jnp.ones((4, 3))}
    >>> f = lambda params, x: x @ params["w"]
    >>> layout = lora_jax.resolve(lora_jax.LoraSpec(1, 1.0, ("w",)), f, params, jnp.ones((2, 4)))
    >>> merged = merge(layout, params, {"w": Factors(jnp.ones((4, 1)), 2 * jnp.ones((1, 3)))})
    >>> merged["w"][0]
    Array([3., 3., 3.], dtype=float32)
    """
    leaves = paths.flatten(params)
    layout.check_params(leaves)
    check(layout, adapters)
    return paths.replace(
        params,
        {t.path: kind_of(t).merged(t, adapters[t.path], leaves[t.path]) for t in layout.targets},
    )


def factors_alone(adapter: Adapter, doing: str) -> Adapter:
    """Return the adapter (or a plain tuple as one) if it has no trainable base parameters.

    `doing` is the verb of the message: "stacked".
    """
    adapter = Adapter(*adapter)
    if adapter.trainable:
        raise LoraError(
            f"an adapter that also trained base parameters cannot be {doing}, since only factors "
            f"can:\n{listed(adapter.trainable)}\n"
            "Pass adapter._replace(trainable={}), and put these into the parameters yourself: "
            "lora_jax.paths.replace(params, adapter.trainable)"
        )
    return adapter


def as_factors(layout: Layout, adapters: Adapters) -> tuple[Layout, Adapters]:
    """Return the same update with plain factors at every target, exactly: see `lora_jax.as_lora`.

    Raises:
      LoraError: adapters that do not fit the layout, DoRA (its update depends on W), or a bias (it
        has no factors).
    """
    check(layout, adapters)
    found = [_as_factors(t, adapters[t.path]) for t in layout.targets]
    lora = dataclasses.replace(layout, targets=tuple(target for target, _ in found))
    return lora, {target.path: factors for target, factors in found}


_ELSE = ", merge it, or take lora_jax.as_lora with params= (lora-jax export --as-lora RANK)"


def _as_factors(target: Target, parameters: Any) -> tuple[Target, Factors]:
    """Return the target with a plain low-rank update, and the factors of that update.

    Raises:
      LoraError: DoRA (its update depends on W), or a bias (it has no factors).
    """
    kind = kind_of(target)
    factors = kind.factors(target, parameters)
    if factors is None or kind.rescales or kind.activated:
        why = "has no factors" if factors is None else "rescales W itself"
        why = "is on for some tokens only" if kind.activated else why
        raise LoraError(
            f"{target.path!r}: an update of the kind {target.kind!r} {why}, so it cannot be "
            "written as plain LoRA factors. Use the adapter alone (lora_jax.adapt)"
            + ("" if kind.activated else _ELSE)
        )
    scale, rank = kind.scale(target), factors.a.shape[-1]
    if factors is parameters and scale == target.scale:
        return dataclasses.replace(target, kind=LoraSpec.kind), factors
    limit = min(target.fan_in, target.fan_out)
    if rank > limit:
        factors = _of_full_rank(target, factors)
    lora = target.plain(min(rank, limit))
    return dataclasses.replace(lora, alpha=scale * lora.rank), factors


def _of_full_rank(target: Target, factors: Factors) -> Factors:
    """Return factors of the same product, one of which is an identity."""
    stack = target.sizes(target.stack)
    a = factors.a.reshape(*stack, target.fan_in, -1)
    b = factors.b.reshape(*stack, a.shape[-1], target.fan_out)
    limit = min(target.fan_in, target.fan_out)
    product = jnp.matmul(a, b, precision="highest")
    unit = jnp.broadcast_to(jnp.eye(limit, dtype=product.dtype), (*stack, limit, limit))
    a, b = (unit, product) if limit == target.fan_in else (product, unit)
    return Factors(
        a.reshape(*target.a_shape[:-1], limit),
        b.reshape(*stack, limit, *target.sizes(target.outputs)),
    )
