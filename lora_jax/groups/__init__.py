"""Many runs over one base, as one program: each keeps what it would have alone."""

from lora_jax.extras import require

require("train", __name__)
