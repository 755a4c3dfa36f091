"""The commands, one in a file: their options and what they print."""

from lora_jax.system.extras import require

require("train", __name__)
