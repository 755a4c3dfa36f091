"""What `train.py` is made of: the config, the workload, the step, the loop, and what is kept."""

from lora_jax.extras import require

require("train", __name__)
