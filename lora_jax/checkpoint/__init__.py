"""Adapters on disk: Orbax writes the arrays, and a manifest describes and hashes them."""

from lora_jax.checkpoint.adapter import restore as restore
from lora_jax.checkpoint.adapter import restore_about as restore_about
from lora_jax.checkpoint.adapter import restore_layout as restore_layout
from lora_jax.checkpoint.adapter import save as save
from lora_jax.checkpoint.fingerprint import fingerprint as fingerprint
from lora_jax.errors import DamagedError as DamagedError
