"""Adapters that are on for some tokens only: activated LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.errors import LoraError
from lora_jax.layout import Layout
from lora_jax.multi.selected import Around
from lora_jax.spec import Target
from lora_jax.transform import UpdateOf
from lora_jax.updates.activated import OnTokens
from lora_jax.updates.named import Names
from lora_jax.updates.update import Update


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activated(Around):
    """Adapters and the tokens for which they are on, as `lora_jax.adapt` takes them.

    Attributes:
      active: bool [B, T] or [].
    """

    active: Any

    def choice(self, layout: Layout) -> Any:
        inner, active = super().choice(layout), self.active
        if self.per_example:
            examples = jax.tree.leaves(inner)[0].shape[:1]
            shared = active.ndim == 0  # else each example has its own, as a batch of one
            active = jnp.broadcast_to(active, examples) if shared else active[:, None]
        return inner, active

    def updates(self, layout: Layout, choice: Any) -> UpdateOf:
        inner, active = choice
        of = super().updates(layout, inner)

        def update_of(target: Target, w: Any, names: Names) -> Update | jax.Array:
            update = of(target, w, names)
            if not isinstance(update, Update):
                raise LoraError(
                    f"{target.path!r}: an update of the kind {target.kind!r} cannot be on for some "
                    "tokens only, since it has no low rank; take kind='alora'"
                )
            return OnTokens.start(update, active)

        return update_of


def activated(adapters: Any, active: Any) -> Activated:
    """Return adapters that are on for some tokens only, for the function that `adapt` returns.

    Activated LoRA (arXiv 2504.12397; PEFT's `alora_invocation_tokens`) is on from an invocation on:
    a few tokens that say what the adapter shall do. What comes before is computed by the base. So
    a prompt is read once, and its keys and values serve any number of adapters.

    Args:
      adapters: an adapter tree, or the result of `lora_jax.multi.select` or `lora_jax.dropout`.
        Any kind with a low rank can be switched; `kind="alora"` is LoRA that must be.
      active: bool [B, T], such as `invoked(ids, tokens)`, where all products of the targets have x
        [B, T, ...] (or look up ids [B, T]). True: all tokens, for a call that only sees what
        follows the invocation.

    Returns:
      A value for the place of the adapters. The outputs of the tokens that are not active are the
      base's, if each token depends only on those before.

    Raises:
      LoraError: when the function is called: a target that is multiplied with other axes.

    >>> import lora_jax
    >>> f = lambda params, x: x @ params["w"]
    >>> params, x = {"w": jnp.ones((4, 3))}, jnp.ones((1, 2, 4))
    >>> spec = lora_jax.LoraSpec(1, 1.0, "w", kind="alora")
    >>> layout = lora_jax.resolve(spec, f, params, x)
    >>> adapters = {"w": lora_jax.Factors(jnp.ones((4, 1)), jnp.ones((1, 3)))}
    >>> active = invoked(jnp.array([[5, 7]]), [7])
    >>> lora_jax.adapt(layout, f)(params, activated(adapters, active), x)[0, :, 0].tolist()
    [4.0, 8.0]
    """
    active = jnp.asarray(active)
    if active.dtype != jnp.bool_:
        raise LoraError(f"the active tokens are booleans, got an array of {active.dtype}")
    return Activated(adapters, active)


def invoked(ids: Any, tokens: Sequence[int]) -> Array:
    """Return which tokens are in the last invocation of their row or after it.

    Args:
      ids: int [B, T], the tokens.
      tokens: the tokens of the invocation, one after another.

    Returns:
      bool [B, T]. A row without an invocation has none.

    >>> invoked(jnp.array([[7, 8, 1, 7, 8, 2], [8, 7, 1, 1, 1, 1]]), [7, 8]).astype(int).tolist()
    [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    """
    ids, count = jnp.asarray(ids), len(tokens)
    if not count:
        raise LoraError("an invocation has at least one token, got none")
    places = ids.shape[1] - count + 1
    found = jnp.ones((len(ids), max(places, 0)), bool)
    for i, token in enumerate(tokens):
        found &= ids[:, i : max(places, 0) + i] == token
    number = jnp.arange(ids.shape[1])[None]
    last = jnp.where(found, number[:, : found.shape[1]], -1).max(1, initial=-1, keepdims=True)
    return (last >= 0) & (number >= last)
