"""The error of everything that reads data."""

from __future__ import annotations

from lora_jax.errors import LoraError


class DataError(LoraError):
    """The data, or what the config says of it, cannot be used; the message says where and why."""
