"""The error of all code that reads data."""

from __future__ import annotations

from lora_jax.errors import LoraError


class DataError(LoraError):
    """The data, or its config, cannot be used; the message says where and why."""
