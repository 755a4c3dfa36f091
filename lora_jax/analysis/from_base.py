"""Adapters that start with a part of W, over a base without it: PiSSA, OLoRA and LoftQ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import paths
from lora_jax.adapters import Adapters
from lora_jax.analysis import matrices
from lora_jax.analysis.matrices import Array
from lora_jax.base import is_base
from lora_jax.bases.quantise import quantize, scheme_of
from lora_jax.errors import LoraError, nearest
from lora_jax.layout import Layout
from lora_jax.spec import Target
from lora_jax.updates.kind import kind_of

Tree = Any  # a pytree
BaseMethod = Literal["pissa", "olora", "loftq"]
Split = Callable[[Target, Any], tuple[Array, Array]]
"""A function from a matrix [in, out] to a [in, rank] and b [rank, out], which hold a part of it."""


class StartError(NamedTuple):
    """The part of W that one target's start misses, as Frobenius norms relative to W's.

    Attributes:
      start: the norm of `W - (new base + update)`: rounding, or the loss of quantisation.
      plain: the norm of `W - base` if the base were stored as it is and the update were zero. An
        adapter from `lora_jax.init` starts there.
    """

    start: float
    plain: float


class Start(NamedTuple):
    """A base and the adapters that go with it: each is useless without the other.

    Attributes:
      params: the parameters with another base at each target. Train on top of these, and keep them.
      adapters: the arrays that hold the rest of W.
      errors: `{path: StartError}`.
    """

    params: Tree
    adapters: Adapters
    errors: dict[str, StartError]


def init_from_base(
    layout: Layout,
    params: Tree,
    method: BaseMethod = "pissa",
    *,
    quantised: Tree = None,
    steps: int = 5,
) -> Start:
    """Return adapters that start with a part of W, and **a new base**: W without that part.

        W = R + scale * a @ b          R: the new base, frozen from then on

    "pissa" (arXiv 2404.02948): a b holds the `rank` largest singular values of W, with their
      vectors, so the first steps move the most important directions of W. With a quantised base, R
      is quantised instead of W (QPiSSA). That loses less, since R has no large values left.
    "olora" (arXiv 2406.01775): with the QR factorisation W^T = Q R' of the torch weight [out, in],
      b is the first rows of Q^T, which are orthonormal, and a is the first rows of R', transposed.
    "loftq" (arXiv 2310.08659): for a quantised base. a b starts as the best correction of the
      quantisation error. Then R is W - a b, quantised again, and a b the best correction of that,
      and so on for `steps` rounds. The best round is kept.

    The singular values are divided by the scale, so that the sum is W for any alpha (PEFT forgets
    this for LoftQ). R is computed from the factors in their stored dtype. So
    `adapt(layout, f)(start.params, start.adapters, x)` is `f(params, x)` up to the rounding of R
    to its dtype, or up to the loss of quantising R; `start.errors` reports it.

    An adapter trained over a float base moves to the original base at twice the rank:
    `multi.combine([(layout, trained), (layout, start.adapters)], [1.0, -1.0])`.

    Args:
      layout: from `lora_jax.resolve`; kinds "lora" (of whole weights) and "dora".
      params: the base parameters; not changed. For "loftq", the float ones before quantisation.
      method: see above.
      quantised: `params` quantised by `lora_jax.quantize`; R is then stored in the same way. If a
        target is quantised in `params` itself, W is its dequantised value.
      steps: rounds of "loftq", at least 1.

    Returns:
      `Start(params, adapters, errors)`: a tree like `params` (or like `quantised`, if given), and
      float32 factors that share each singular value evenly. If min(in, out) is above 1,024, the
      largest singular values are computed iteratively: see `lora_jax.analysis.matrices.top_svd`.

    Raises:
      LoraError: a layout that does not fit the parameters, a kind that cannot start like this, a
        scale that is not above zero, "loftq" without a quantised base, or a base that cannot be
        quantised again.

    >>> import lora_jax
    >>> layout = Layout((Target("w", (3, 3), (), (0,), (1,), rank=1, alpha=4.0),))
    >>> start = init_from_base(layout, {"w": jnp.diag(jnp.array([9.0, 2.0, 1.0]))})
    >>> [round(float(x), 5) for x in jnp.diag(start.params["w"])]
    [0.0, 2.0, 1.0]
    >>> merged = lora_jax.merge(layout, start.params, start.adapters)["w"]
    >>> [round(float(x), 5) for x in jnp.diag(merged)]
    [9.0, 2.0, 1.0]
    """
    if method not in get_args(BaseMethod):
        raise LoraError(
            f"no method {method!r}; nearest: {nearest(method, get_args(BaseMethod), 1)[0]!r}, of "
            f"{', '.join(get_args(BaseMethod))}. For random ones use lora_jax.init"
        )
    leaves = paths.flatten(params)
    stored = leaves if quantised is None else paths.flatten(quantised)
    layout.check_params(leaves)
    layout.check_params(stored)
    found = {
        t.path: _begin(t, leaves[t.path], stored[t.path], method, steps) for t in layout.targets
    }
    rest = {path: base for path, (base, _, _) in found.items()}
    return Start(
        paths.replace(params if quantised is None else quantised, rest),
        {path: parameters for path, (_, parameters, _) in found.items()},
        {path: error for path, (_, _, error) in found.items()},
    )


class _Part(NamedTuple):
    """A base, factors for it, and the relative distance of their sum from W."""

    base: Any
    a: Any
    b: Any
    error: float


def _begin(
    target: Target, w: Any, stored: Any, method: BaseMethod, steps: int
) -> tuple[Any, Any, StartError]:
    """Return the new base of one target, its arrays, and the error."""
    _check(target, w, stored, method, steps)
    whole = matrices.of_weight(target, w)
    if method == "loftq":
        rounds = _rounds(target, whole, stored, steps)
        found = min(rounds, key=lambda part: part.error)
    else:
        a, b = _factors(target, whole, _principal if method == "pissa" else _orthonormal)
        found = _part(target, whole, _stored(target, whole - _product(target, a, b), stored), a, b)
    factors = matrices.to_factors(target, jnp.asarray(found.a), jnp.asarray(found.b))
    parameters = kind_of(target).from_factors(target, factors, found.base)
    plain = _distance(whole, _matrix(target, stored))
    return found.base, parameters, StartError(found.error, plain)


def _rounds(target: Target, whole: Any, base: Any, steps: int) -> Iterator[_Part]:
    """Yield the rounds of LoftQ: the best factors for a base, then a base for these factors."""
    like = base
    for step in range(steps):
        a, b = _factors(target, whole - _matrix(target, base), _principal)
        yield _part(target, whole, base, a, b)
        if step < steps - 1:
            base = _stored(target, whole - _product(target, a, b), like)


def _part(target: Target, whole: Any, base: Any, a: Any, b: Any) -> _Part:
    held = _matrix(target, base) + _product(target, a, b)
    return _Part(base, a, b, _distance(whole, held))


def _check(target: Target, w: Any, stored: Any, method: BaseMethod, steps: int) -> None:
    if target.scale <= 0:
        raise LoraError(
            f"{target.path!r}: its scale is {target.scale}; factors that begin with a part of W "
            "are divided by it, so alpha must be above 0"
        )
    if method == "loftq" and (is_base(w) or not is_base(stored)):
        raise LoraError(
            f"{target.path!r}: LoftQ corrects what quantising W loses, so it needs W in float and "
            "quantised: init_from_base(layout, params, 'loftq', "
            "quantised=lora_jax.quantize(params, 'nf4', layout))"
        )
    if method == "loftq" and steps < 1:
        raise LoraError(f"LoftQ takes at least 1 step, got steps={steps}")


def _factors(target: Target, matrix: Any, split: Split) -> tuple[Any, Any]:
    """Apply `split` to each slice of [*stack, in, out], in float32."""
    stack = matrix.shape[:-2]
    a = np.zeros((*stack, target.fan_in, target.rank), np.float32)
    b = np.zeros((*stack, target.rank, target.fan_out), np.float32)
    for at in np.ndindex(stack):
        a[at], b[at] = split(target, matrix[at].astype(np.float64))
    return a, b


def _principal(target: Target, matrix: Any) -> tuple[Array, Array]:
    return matrices.shared(matrices.top_svd(matrix, target.rank), target.scale)


def _orthonormal(target: Target, matrix: Any) -> tuple[Array, Array]:
    q, r = np.linalg.qr(matrix.T)
    return r[: target.rank].T, q[:, : target.rank].T


def _product(target: Target, a: Any, b: Any) -> Any:
    """Return `scale * a @ b` of the stored factors, in float64."""
    return target.scale * a.astype(np.float64) @ b.astype(np.float64)


def _matrix(target: Target, w: Any) -> Any:
    return matrices.of_weight(target, w).astype(np.float64)


def _distance(whole: Any, other: Any) -> float:
    size = float(np.linalg.norm(whole.astype(np.float64)))
    return float(np.linalg.norm(whole.astype(np.float64) - other)) / size if size else 0.0


def _stored(target: Target, matrix: Any, like: Any) -> Any:
    """Return [*stack, in, out] as a weight of the same kind and placement as `like`."""
    w = matrices.to_weight(target, matrix).astype(like.dtype)
    if not is_base(like):
        return _placed(w, like)
    scheme, block, double = scheme_of(like, target.path)
    layout = Layout((target,))
    found = quantize({target.path: jnp.asarray(w)}, scheme, layout, block=block, double=double)
    new = found[target.path]
    form: tuple[Any, Any] = (jax.tree.structure(new), jax.tree.structure(like))
    return jax.tree.map(_placed, new, like) if form[0] == form[1] else new


def _placed(new: Any, old: Any) -> Any:
    if isinstance(old, jax.Array):
        return jax.device_put(new, old.sharding)
    return new
