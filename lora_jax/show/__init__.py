"""Show the parameters of a model and what patterns match of them, before anything is trained."""

from lora_jax.extras import require

require("train", __name__)
