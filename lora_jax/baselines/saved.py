"""Tell a saved LoRA adapter from what another method has left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.baselines.methods import EXTRA
from lora_jax.errors import LoraError, listed


def check_lora(name: str, where: object, trained: Iterable[str], about: Mapping[str, Any]) -> None:
    """Raise where a method has put parameters of its own into the model.

    Nobody who takes LoRA adapters reads them, and without them the outputs would be those of
    another model.

    Args:
      name: of the adapter.
      where: its folder.
      trained: the paths of `Adapter.trainable`.
      about: what was saved with it.

    Raises:
      LoraError: a method has.
    """
    own = [path for path in trained if path.startswith(f"{EXTRA}/")]
    if own:
        raise LoraError(
            f"{name!r} ({where}) was trained by the method {str(about.get('method'))[:80]}, which "
            f"puts parameters of its own into the model:\n{listed(own)}\nHere LoRA adapters are "
            "taken, and base parameters trained beside them. The run's summary.json has its "
            "scores; in Python, lora_jax.baselines.Method.apply runs the model with them"
        )
