"""Attention of the small copies: one head of keys and values for all heads of queries."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def attend(q: Any, k: Any, v: Any, mask: Any = None) -> jax.Array:
    """Return [batch, query, head, size] of queries in this form, and [batch, key, size] others."""
    logits = jnp.einsum("btnh,bsh->bnts", q, k, preferred_element_type=jnp.float32)
    logits = logits if mask is None else jnp.where(mask[:, None], logits, -1e30)
    probabilities = jax.nn.softmax(logits * q.shape[-1] ** -0.5).astype(v.dtype)
    return jnp.einsum("bnts,bsh->btnh", probabilities, v)
