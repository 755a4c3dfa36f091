"""A small copy of big_vision's PaliGemma: SigLIP and Gemma in Linen, with scanned layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.cases import near_ones_and_zeros, normal
from tests.foreign.copies.openpi import Expert, Gemma, Vision


class PaliGemma(nn.Module):
    """Logits [batch, text, vocabulary] of a text that sees the whole image."""

    def setup(self) -> None:
        self.img, self.llm = Vision(8), Gemma((Expert(8, 12),))

    def __call__(self, image: Any, text: Any) -> Any:
        seen = self.img(image)
        x = jnp.concatenate([seen, self.llm.embed(text)], axis=1)
        at, n = jnp.arange(x.shape[1]), seen.shape[1]
        mask = (at[:, None] >= at) | (at < n)
        (x,) = self.llm([x], mask[None])
        return x[:, n:] @ self.llm.table.T


def create() -> tuple[PaliGemma, Any]:
    """The model and its parameters, drawn by NumPy."""
    model = PaliGemma()
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example())
    return model, near_ones_and_zeros(shapes["params"])


def example() -> tuple[jax.Array, jax.Array]:
    """Images and texts."""
    return normal(1, 2, 4, 4, 3), jnp.arange(6).reshape(2, 3)
