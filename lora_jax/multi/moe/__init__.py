"""Mixtures of LoRA experts: fixed weights or routers, and the load of each expert."""

from lora_jax.multi.moe.router import Mixture as Mixture
from lora_jax.multi.moe.router import Routed as Routed
from lora_jax.multi.moe.router import init_router as init_router
from lora_jax.multi.moe.router import mix as mix
from lora_jax.multi.moe.router import route as route
from lora_jax.multi.moe.statistics import Load as Load
from lora_jax.multi.moe.statistics import balance as balance
from lora_jax.multi.moe.statistics import router_load as router_load
from lora_jax.updates.gating import gates as gates
