"""Texts of examples: their fields, templates that use them, and their tokens."""

from lora_jax.system.extras import require

require("train", __name__, "tokenizers")
