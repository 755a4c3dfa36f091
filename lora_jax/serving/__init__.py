"""Use adapters: the commands `predict` and `generate`, and the code behind them."""

from lora_jax.system.extras import require

require("train", __name__)
