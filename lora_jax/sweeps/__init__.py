"""Train many runs over one base as one program, each with the result that it would have alone."""

from lora_jax.system.extras import require

require("train", __name__)
