"""What a run will need, found by compiling its step for devices that need not be there."""

from lora_jax.training.plan.options import Options as Options
from lora_jax.training.plan.plan import make as make
from lora_jax.training.plan.report import text as text
from lora_jax.training.plan.report import write as write
