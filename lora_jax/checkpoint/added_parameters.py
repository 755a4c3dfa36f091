"""Tell a saved LoRA adapter from the result of a method that adds parameters to the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.errors import LoraError, listed

EXTRA = "extra"  # the key of a method's own parameters, next to the model's


def check_lora(name: str, where: object, trained: Iterable[str], about: Mapping[str, Any]) -> None:
    """Raise if a method has added parameters of its own to the model.

    Code that loads LoRA adapters ignores them, so it would compute another model. `trained` are
    the paths of `Adapter.trainable`, and `about` the notes saved with the adapter `name`.
    """
    own = [path for path in trained if path.startswith(f"{EXTRA}/")]
    if own:
        raise LoraError(
            f"{name!r} ({where}) was trained by the method {str(about.get('method'))[:80]}, which "
            f"adds parameters of its own to the model:\n{listed(own)}\nOnly LoRA adapters, and "
            "base parameters trained in full with them, can be used here. The run's summary.json "
            "has its scores; in Python, Method.apply runs the model with them (docs/methods.md)"
        )
