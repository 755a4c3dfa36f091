"""Show the parameters of a model, and which of them patterns match, before training."""

from lora_jax.system.extras import require

require("train", __name__)
