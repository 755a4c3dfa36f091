"""The similarity of the subspaces of two adapters: the paper's phi (section 7.2)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from lora_jax.adapters import Adapter, check
from lora_jax.analysis import matrices
from lora_jax.analysis.as_lora import as_lora, factors_of
from lora_jax.analysis.matrices import Array
from lora_jax.errors import LoraError, listed, nearest
from lora_jax.layout import Layout
from lora_jax.spec import Target

Side = Literal["a", "b", "input", "output"]
SIDES: tuple[Side, ...] = ("a", "b", "input", "output")


def similarity(one: Adapter, two: Adapter, of: Side = "a", params: Any = None) -> dict[str, Array]:
    """Return phi(i, j) of every target: the share of one's top i directions within two's top j.

        phi(i, j) = ||U1[:, :i]^T U2[:, :j]||_F^2 / min(i, j)          in [0, 1]

    U1 and U2 have orthonormal columns, the most important direction first. 1 means that the larger
    subspace contains the smaller one, 0 that they are orthogonal. Two random subspaces of d
    dimensions have max(i, j) / d on average; compare with `lora_jax.init` and another key to see
    it.

    Args:
      one, two: adapters with the same targets; the ranks may differ.
      of: which directions to compare.
        "a": the left-singular vectors of the factor `a` [in, rank]. The paper stores A = a^T and
          calls them the right-singular vectors of A; its figures 3 and 4 show these.
        "b": the right-singular vectors of `b`, in the output space.
        "input", "output": the singular vectors of the update `a b` on either side. They have the
          same span as the vectors of the factors, in the order of their effect on the update.
      params: the base parameters of both, for "input" and "output" of DoRA: its update is the
        change that merging makes, W' - W.

    Returns:
      `{path: [*stack, rank of one, rank of two]}` in float64; entry [i - 1, j - 1] is phi(i, j).
      It is NaN if i or j exceeds the number of directions that exist: a direction's singular value
      must be above float32's rounding of the largest. A `b` that is still zero has none.

    Raises:
      LoraError: adapters that do not fit their layout, DoRA without parameters, different targets
        in the two adapters, or one path with different shapes or roles.

    Source:
      Section 7.2 of arXiv 2106.09685. Appendix G writes 1 - d(i, j)^2 with the projection metric's
      d = sqrt(p - sum sigma^2), p = min(i, j). But its figures plot 1 - d^2 / p, as we compute.

    >>> import jax.numpy as jnp
    >>> from lora_jax import Factors
    >>> layout = Layout((Target("w", (4, 3), (), (0,), (1,), rank=2, alpha=1.0),))
    >>> axes = jnp.eye(4)
    >>> one = {"w": Factors(jnp.stack([3 * axes[0], axes[1]], 1), jnp.ones((2, 3)))}
    >>> two = {"w": Factors(jnp.stack([3 * axes[1], axes[2]], 1), jnp.ones((2, 3)))}
    >>> similarity((layout, one), (layout, two))["w"]
    array([[0. , 0. ],
           [1. , 0.5]])
    """
    check_side(of)
    one, two = Adapter(*one), Adapter(*two)
    check(one.layout, one.parameters)
    check(two.layout, two.parameters)
    _check_targets(one.layout, two.layout)
    if of in ("input", "output"):
        one, two = (
            Adapter(*as_lora(x.layout, x.parameters, params=params)[:2]) for x in (one, two)
        )
    out = {}
    for target in one.layout.targets:
        path = target.path
        first = directions(target, one.parameters[path], of)
        second = directions(two.layout[path], two.parameters[path], of)
        out[path] = phi(first, second)
    return out


def phi(one: Array, two: Array) -> Array:
    """Return phi(i, j) for all i and j of two orthonormal bases.

    A column of NaN is a direction that does not exist; from there on the result is NaN.

    Args:
      one: [*stack, d, r1].
      two: [*stack, d, r2].

    Returns:
      [*stack, r1, r2]; entry [i - 1, j - 1] is phi(i, j).
    """
    squares = (one.mT @ two) ** 2  # phi(i, j) min(i, j) is the sum of its upper left [i, j] block
    sums = squares.cumsum(axis=-1).cumsum(axis=-2)
    rows, columns = np.arange(1, sums.shape[-2] + 1), np.arange(1, sums.shape[-1] + 1)
    return sums / np.minimum(rows[:, None], columns)


def directions(target: Target, factors: Any, of: Side) -> Array:
    """Return the orthonormal directions that `similarity` compares, [*stack, d, rank]."""
    a, b = matrices.of_factors(target, factors_of(target, factors))
    if of == "a":
        found = matrices.tall_svd(a)
    elif of == "b":
        found = matrices.tall_svd(b.mT)
    else:
        found = matrices.update_svd(target, factors)
    side = found.right if of == "output" else found.left
    exist = matrices.defined(found.values)
    return np.where(exist[..., None, :], side, np.nan)


def check_side(of: Any) -> None:
    if of not in SIDES:
        raise LoraError(f"of must be one of {list(SIDES)}, got {of!r}")


def _check_targets(one: Layout, two: Layout) -> None:
    first, second = ({t.path: t for t in layout.targets} for layout in (one, two))
    for path, target in {**first, **second}.items():
        if path not in first or path not in second:
            missing = second if path in first else first
            raise LoraError(
                f"only one of the two adapters has {path!r}; nearest in the other:\n"
                f"{listed(nearest(path, missing))}\n"
                "Compare the targets that both have: layout.subset(patterns), and the factors of "
                "those paths."
            )
        if first[path].form != second[path].form:
            raise LoraError(
                f"{path!r} is not the same parameter in both adapters: (shape, stack, inputs, "
                f"outputs) is {first[path].form} in one and {target.form} in the other"
            )
