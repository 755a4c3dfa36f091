"""Find published weights, and load them as parameter trees."""

from lora_jax.extras import require

require("train", __name__, "safetensors", "tokenizers")
