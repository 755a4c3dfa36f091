"""Distinguish a saved LoRA adapter from the result of another method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lora_jax.baselines.methods import EXTRA
from lora_jax.errors import LoraError, listed


def check_lora(name: str, where: object, trained: Iterable[str], about: Mapping[str, Any]) -> None:
    """Raise if a method has added parameters of its own to the model.

    Code that loads LoRA adapters ignores them, so it would compute another model.

    Args:
      name: the name of the adapter.
      where: its folder.
      trained: the paths of `Adapter.trainable`.
      about: the notes that were saved with it.

    Raises:
      LoraError: there are such parameters.
    """
    own = [path for path in trained if path.startswith(f"{EXTRA}/")]
    if own:
        raise LoraError(
            f"{name!r} ({where}) was trained by the method {str(about.get('method'))[:80]}, which "
            f"adds parameters of its own to the model:\n{listed(own)}\nOnly LoRA adapters, and "
            "base parameters trained in full with them, can be used here. The run's summary.json "
            "has its scores; in Python, lora_jax.baselines.Method.apply runs the model with them"
        )
