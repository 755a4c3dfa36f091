"""Labels of trained arrays, so that an optimizer can treat some of them differently.

LoRA+ gives B a larger learning rate than A. Weight decay often leaves out biases, norms and
DoRA's magnitudes. Both are settings of the optimizer alone, so they are written with optax:

    tx = optax.chain(optax.adamw(1e-3, mask=labels.all_but("bias", "norm")), labels.loraplus(16))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from lora_jax.errors import LoraError
from lora_jax.paths import path_of
from lora_jax.updates.kind import is_parameters

if TYPE_CHECKING:
    import optax

BIAS, NORM, WEIGHT = "bias", "norm", "weight"  # the labels of base parameters


def labels(trained: Any) -> Any:
    """Label each array of a tree that holds adapters, base parameters, or both.

    An array of an adapter is labelled by its field: "a", "b", "magnitude" (DoRA), and so on. The
    difference that the kind "bias" trains is labelled "bias". A base parameter is a "bias" if that
    is the last name in its path; a "norm" if some name in its path contains "norm" or its last name
    is "scale"; and a "weight" otherwise.

    Args:
      trained: a pytree of trained arrays.

    Returns:
      A tree like `trained` with a string in place of each array, for `optax.partition`.

    >>> import jax.numpy as jnp
    >>> from lora_jax.updates import Factors
    >>> adapters = {"q/kernel": Factors(a=jnp.ones((8, 2)), b=jnp.ones((2, 4)))}
    >>> labels({"adapters": adapters, "base": {"head/kernel": 0, "head/bias": 0}})["adapters"]
    {'q/kernel': Factors(a='a', b='b')}
    >>> labels({"head/kernel": 0, "head/bias": 0, "layer_norm/scale": 0})
    {'head/bias': 'bias', 'head/kernel': 'weight', 'layer_norm/scale': 'norm'}
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _fields(leaf) if is_parameters(leaf) else _base_label(path_of(path)),
        trained,
        is_leaf=is_parameters,
    )


def all_but(*names: str) -> Callable[[Any], Any]:
    """Return a mask of all arrays except those with these labels, in the form that optax takes.

    Args:
      *names: labels, as `labels` assigns them.

    Returns:
      A function from a tree to a tree of bools.

    >>> import optax
    >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=all_but("bias", "norm"))
    >>> all_but("bias")({"head/kernel": 0, "head/bias": 0})
    {'head/bias': False, 'head/kernel': True}
    """
    return lambda trained: jax.tree.map(lambda label: label not in names, labels(trained))


def loraplus(ratio: float) -> optax.GradientTransformation:
    """Multiply the learning rate of B by `ratio` (LoRA+, arXiv 2402.12354, which recommends 16).

    It is meant for the kinds "lora" and "dora", whose `b` begins at zero.

    Args:
      ratio: the learning rate of B divided by that of A.

    Returns:
      A transformation without state, to be chained after an optimizer.

    Raises:
      LoraError: a ratio that is not above 0.

    >>> import jax.numpy as jnp, optax
    >>> from lora_jax.updates import Factors
    >>> tx = optax.chain(optax.sgd(0.1), loraplus(16))
    >>> adapters = {"q/kernel": Factors(a=jnp.ones((1, 1)), b=jnp.ones((1, 1)))}
    >>> updates, _ = tx.update(adapters, tx.init(adapters))
    >>> [round(float(x[0, 0]), 6) for x in updates["q/kernel"]]
    [-0.1, -1.6]
    """
    import optax  # imported here so that `import lora_jax` stays fast

    if not ratio > 0:
        raise LoraError(f"the ratio of the learning rates of B and A must be above 0, got {ratio}")

    def scaled(updates: Any, _: Any) -> Any:
        by_label = lambda u, label: u * ratio if label == "b" else u  # noqa: E731
        return jax.tree.map(by_label, updates, labels(updates))

    return optax.stateless(scaled)


def _fields(parameters: Any) -> Any:
    return type(parameters)(*(BIAS if name == "delta" else name for name in parameters._fields))


def _base_label(path: str) -> str:
    names = path.split("/")
    if names[-1] == "bias":
        return BIAS
    if names[-1] == "scale" or any("norm" in name.lower() for name in names):
        return NORM
    return WEIGHT
