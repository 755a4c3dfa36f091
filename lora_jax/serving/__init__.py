"""Adapters in use: the commands `predict` and `generate`, and what they are made of."""

from lora_jax.extras import require

require("train", __name__)
