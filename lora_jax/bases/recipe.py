"""How a base was quantised, as JSON that goes with an adapter: whoever uses it does the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_jax.bases.quantise import quantize
from lora_jax.errors import LoraError
from lora_jax.layout import Layout

Tree = Any  # a pytree

ABOUT = "quantized"  # the entry of what is said about an adapter (`lora_jax.save(about=...)`)
BEGUN = "begun"  # the entry that says by which method of `lora_jax.init_from_base` it was changed
STORED = "stored"  # the scheme of weights that are held as their file has them


def recipe(scheme: str, layout: Layout, block: int | None, double: bool) -> dict[str, Any]:
    """Return what `quantize` was given, as JSON values."""
    return {"scheme": scheme, "block": block, "double": double, "layout": layout.to_json()}


def requantised(params: Tree, recipe: Mapping[str, Any]) -> Tree:
    """Quantise the floats of a base again, as a recipe says.

    Args:
      params: floats; of a base that is held as stored, what was loaded.
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
