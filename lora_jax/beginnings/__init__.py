"""First values of adapters that take more than random numbers: the base itself, or real inputs.

start    = init_from_base(layout, params, "pissa")         PiSSA, OLoRA, LoftQ: also a new base
adapters = init_from_inputs(key, layout, f, params, batches)        EVA

`lora_jax.init` draws `a` at random and needs neither.
"""

from lora_jax.beginnings.from_base import Start as Start
from lora_jax.beginnings.from_base import StartError as StartError
from lora_jax.beginnings.from_base import init_from_base as init_from_base
from lora_jax.beginnings.from_inputs import init_from_inputs as init_from_inputs
