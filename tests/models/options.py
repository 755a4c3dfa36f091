"""The options that make a tiny Llama or BERT a model of another family."""

from typing import Any

import jax
import numpy as np

from lora_jax import models

GPT2: dict[str, Any] = {
    "norm": "layer",
    "positions": "learned",
    "fused": True,
    "qkv_bias": True,
    "output_bias": True,
    "mlp_bias": True,
    "activation": "gelu_tanh",
    "gated": False,
}
GEMMA: dict[str, Any] = {
    "norm": "rms_plus_one",
    "post_norms": True,
    "qk_norm": True,
    "sliding_window": 3,
    "windowed": (True, False),
    "local_rope_theta": 100.0,
    "attention_scale": 0.5,
    "attention_cap": 3.0,
    "logit_cap": 4.0,
    "embedding_scale": 4.0,
    "activation": "gelu_tanh",
}
PHI: dict[str, Any] = {
    "fused": True,
    "rotary_dim": 4,
    "rope_divisors": (1.0, 2.0),
    "rope_long": models.LongRope(64, (2.0, 4.0)),
    "rope_amplitude": 1.2,
    "tied": False,
}
MIXTURE: dict[str, Any] = {"num_experts": 4, "experts_per_token": 2, "renormalised": False}

# Options of `models.BertConfig`.
DEBERTA: dict[str, Any] = {
    "absolute_positions": False,
    "num_token_types": 0,
    "relative": models.Disentangled(16, buckets=4, conv_size=3),
    "head_activation": "gelu",
}
DEBERTA_UNSHARED: dict[str, Any] = {"relative": models.Disentangled(8, shared=False, norm=False)}
MODERNBERT: dict[str, Any] = {
    "absolute_positions": False,
    "num_token_types": 0,
    "head_norm": True,
    "head_bias": False,
    "pre_norm": models.PreNorm(
        rope_theta=100.0,
        local_rope_theta=10.0,
        window=3,
        windowed=(False, True),
        fused=True,
        gated=True,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        norm_bias=False,
        first_norm=False,
    ),
}
VIT = models.VitConfig(
    image_size=(8, 12), patch_size=(4, 4), hidden_size=12, num_layers=2, num_heads=2, mlp_size=26
)

ENCODERS = {"deberta": DEBERTA, "modernbert": MODERNBERT}
FAMILIES = {"gpt2": GPT2, "gemma": GEMMA, "phi": PHI, "mixture": MIXTURE}


def random_params(config: Any, head: models.Head | None = None) -> Any:
    """Return random parameters, each of which has an effect, norms and biases too."""

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        noise = 0.5 * np.random.default_rng(seed).standard_normal(leaf.shape)
        return jax.device_put((noise + (path[-1].key == "scale")).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(draw, models.shapes(config, head))
