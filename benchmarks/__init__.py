"""Benchmarks of the transform: FLOPs, step time, tracing time, and PyTorch + PEFT in comparison.

Every benchmark keeps the memory that it frees, as the commands do; LORA_JAX_KEEP_MEMORY=0 turns
this off.
"""

from lora_jax.system import host_memory

host_memory.keep()
