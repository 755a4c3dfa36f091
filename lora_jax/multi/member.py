"""An adapter as a member of a stack or of a combination, which hold factors and nothing else."""

from __future__ import annotations

from lora_jax.adapters import Adapter
from lora_jax.errors import LoraError, listed


def factors_alone(adapter: Adapter, doing: str) -> Adapter:
    """Return the adapter, a plain tuple made one, if it has no trainable base parameters.

    Args:
      adapter: an `Adapter`, or a tuple of its first two or three fields.
      doing: what cannot be done with base parameters, for the message: "stacked".

    Raises:
      LoraError: it has some, which would be lost.
    """
    adapter = Adapter(*adapter)
    if adapter.trainable:
        raise LoraError(
            f"an adapter that also trained base parameters cannot be {doing}, since only factors "
            f"can:\n{listed(adapter.trainable)}\n"
            "Pass adapter._replace(trainable={}), and put these into the parameters yourself: "
            "lora_jax.paths.replace(params, adapter.trainable)"
        )
    return adapter
