"""Groups: many runs over one base, trained as one program, each with the result it has alone."""

from lora_jax.extras import require

require("train", __name__)
