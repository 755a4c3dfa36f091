"""The recipe by which a base was quantised, as JSON that goes with an adapter.

Whoever uses the adapter quantises the base in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax.bases.quantise import quantize
from lora_jax.errors import LoraError
from lora_jax.layout import Layout

Tree = Any  # a pytree

ABOUT = "quantized"  # the key of the recipe in `lora_jax.save(about=...)`
BEGUN = "begun"  # the key of the method of `lora_jax.init_from_base` that changed the base
STORED = "stored"  # the scheme of weights that keep the format of their file


def recipe(scheme: str, layout: Layout, block: int | None, double: bool) -> dict[str, Any]:
    """Return the arguments of `quantize` as JSON values."""
    return {"scheme": scheme, "block": block, "double": double, "layout": layout.to_json()}


def requantised(params: Tree, recipe: Mapping[str, Any]) -> Tree:
    """Quantise the floats of a base again, by a recipe.

    Args:
      params: float parameters. If the recipe says that the base keeps the format of its file, the
        parameters as they were loaded.
      recipe: from an adapter, which may come from a stranger.

    Raises:
      LoraError: the recipe is not understood, or does not fit the parameters.
    """
    if recipe == {"scheme": STORED}:
        return params
    try:
        scheme, block, double = recipe["scheme"], recipe["block"], recipe["double"]
        if not (isinstance(scheme, str) and type(block) in (int, str, type(None))):
            raise TypeError("scheme or block")
        layout = Layout.from_json(recipe["layout"])
    except (KeyError, TypeError) as error:
        known = {key: str(value)[:80] for key, value in recipe.items()}
        raise LoraError(f"how the base was quantised is not understood: {known}") from error
    return quantize(params, scheme, layout, block=block, double=double)
