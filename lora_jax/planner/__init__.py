"""Plan what a run needs, by compiling its step for devices that need not exist."""

from lora_jax.system.extras import require

require("train", __name__)

from lora_jax.planner.options import PlanOptions as PlanOptions
from lora_jax.planner.plan import make as make
from lora_jax.planner.plan_report import text as text
from lora_jax.planner.plan_report import write as write
