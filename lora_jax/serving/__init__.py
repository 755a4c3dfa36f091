"""Adapters at work: what `lora_jax.generate` and `lora_jax.predict` are made of."""
