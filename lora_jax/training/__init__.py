"""Train one run: its config, workload, step, loop, metrics and checkpoints."""

from lora_jax.extras import require

require("train", __name__)
