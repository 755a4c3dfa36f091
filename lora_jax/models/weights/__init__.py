"""Find published weights, and load them as parameter trees."""

from lora_jax.system.extras import require

require("train", __name__, "safetensors", "tokenizers")
