"""Gemma's own blocks, put together as in its Transformer, which needs more packages."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tests.cases import near_ones_and_zeros
from tests.foreign.flax_models import gemma_modules

modules = gemma_modules()


class Transformer(nn.Module):
    """Logits [batch, length, vocabulary] of Gemma 3, without its vision tower."""

    def setup(self) -> None:
        self.embedder = modules.Embedder(vocab_size=13, embed_dim=6)
        kinds = (modules.AttentionType.LOCAL_SLIDING, modules.AttentionType.GLOBAL)
        self.blocks = [
            modules.Block(
                name=f"layer_{i}",
                num_heads=2,
                num_kv_heads=1,
                embed_dim=6,
                head_dim=4,
                hidden_dim=8,
                sliding_window_size=4,
                use_post_attn_norm=True,
                use_post_ffw_norm=True,
                use_qk_norm=True,
                attn_type=kind,
                query_pre_attn_scalar=0.5,
                transpose_gating_einsum=True,
            )
            for i, kind in enumerate(kinds)
        ]
        self.final_norm = modules._layers.RMSNorm()

    def __call__(self, ids: Any) -> Any:
        x = self.embedder.encode(ids)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        mask = jnp.tril(jnp.ones((1, ids.shape[1], ids.shape[1]), bool))
        for block in self.blocks:
            _, x = block(x, positions, None, mask)
        return self.embedder.decode(self.final_norm(x))


def create() -> tuple[Transformer, Any]:
    """The model and its variables, drawn by NumPy."""
    model, ids = Transformer(), jnp.zeros((1, 2), int)
    return model, near_ones_and_zeros(jax.eval_shape(model.init, jax.random.key(0), ids))
