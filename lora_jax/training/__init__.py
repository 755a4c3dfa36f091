"""Train one run: its config, workload, step, loop, metrics and checkpoints."""

from lora_jax.system.extras import require

require("train", __name__)
