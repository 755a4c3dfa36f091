"""The update of one slice of a stacked parameter: one scanned layer, or one expert."""

from __future__ import annotations

import dataclasses

from lora_jax.base import Array, Parameters
from lora_jax.errors import LoraError
from lora_jax.spec import Target
from lora_jax.updates.kind import kind_of


def sliced(
    target: Target, parameters: Parameters, index: tuple[int, ...]
) -> tuple[Target, Parameters]:
    """Return the update of `W[index]`, for any kind: the target of the slice, and its arrays.

    `index` has a number for each of the leading axes of W, all of which must be stack axes.

    >>> import jax.numpy as jnp
    >>> from lora_jax.updates import Factors
    >>> target = Target("w", (5, 4, 3), (0,), (1,), (2,), rank=2, alpha=1.0)
    >>> one, parameters = sliced(target, Factors(jnp.ones((5, 4, 2)), jnp.ones((5, 2, 3))), (1,))
    >>> one.shape, parameters.a.shape
    ((4, 3), (4, 2))
    """
    lead = len(index)
    if not set(range(lead)) <= set(target.stack):
        raise LoraError(
            f"{target.path!r}: the axes {list(range(lead))} are to be taken apart, but of "
            f"{target.shape} only {list(target.stack)} are stack axes"
        )
    kind = kind_of(target)

    def take(x: Array, along: tuple[int | None, ...]) -> Array:
        return x[tuple(slice(None) if i is None or i >= lead else index[i] for i in along)]

    def shifted(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i - lead for i in axes if i >= lead)

    one = dataclasses.replace(
        target,
        shape=target.shape[lead:],
        stack=shifted(target.stack),
        inputs=shifted(target.inputs),
        outputs=shifted(target.outputs),
    )
    arrays = map(take, parameters, kind.axes(target))
    return one, kind.fields(*arrays)
