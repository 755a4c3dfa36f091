"""Measurements of the transform: FLOPs, step time, tracing time, and PyTorch + PEFT beside it.

Every benchmark keeps the memory that it frees, as the commands do; LORA_JAX_KEEP_MEMORY=0 turns
that off.
"""

from lora_jax import allocator

allocator.keep()
