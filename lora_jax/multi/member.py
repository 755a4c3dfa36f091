"""An adapter as a member of a stack or of a combination, which hold only factors."""

from __future__ import annotations

from lora_jax.adapters import Adapter
from lora_jax.errors import LoraError, listed


def factors_alone(adapter: Adapter, doing: str) -> Adapter:
    """Return the adapter, or a plain tuple as one, if it has no trainable base parameters.

    Args:
      adapter: an `Adapter`, or a tuple of its first two or three fields.
      doing: the verb of the message: "stacked".

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
