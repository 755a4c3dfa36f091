"""Published weights: where they are found, and how they become parameter trees."""

from lora_jax.extras import require

require("train", __name__, "safetensors", "tokenizers")
