"""Conversion to and from the models of other tools: `lora-jax export` and `lora-jax import`."""

from lora_jax.extras import require

require("train", __name__)
