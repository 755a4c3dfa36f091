"""The configuration of an mlx-lm adapter: the settings that decide its function."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_jax.errors import LoraError
from lora_jax.exchange.tensor_file import shown

LAYER = re.compile(r".*?\.(\d+)\.(.*)")  # the number of a layer, and a module's name inside it


class MlxConfig(NamedTuple):
    """The settings that decide the function; all others are the history of a training run.

    method: fine_tune_type: "lora", "dora" or "full".
    rank, scale: of all modules; the scale is the factor itself.
    layers: num_layers, the number of adapted layers, counted from the last; -1: all.
    keys: the names of the adapted modules, inside a layer or in full; None: all.
    """

    method: str
    rank: int
    scale: float
    layers: int
    keys: tuple[str, ...] | None


def parse(settings: Mapping[str, Any]) -> MlxConfig:
    """Return the settings that decide the function."""
    method = settings.get("fine_tune_type", "lora")
    if "peft_type" in settings or method not in ("lora", "dora", "full"):
        raise LoraError(
            f"fine_tune_type is {shown(method)!r}, expected 'lora', 'dora' or 'full'; a "
            "configuration with peft_type is read by exchange.peft"
        )
    if method == "full":
        return MlxConfig(method, 0, 1.0, -1, None)
    given, layers = settings.get("lora_parameters"), settings.get("num_layers")
    if not isinstance(given, dict) or type(layers) is not int:
        raise LoraError("expected lora_parameters {rank, scale, dropout, keys} and num_layers")
    other = set(given) - {"rank", "scale", "dropout", "keys"}
    if other:
        raise LoraError(
            f"lora_parameters has {shown(sorted(other))}; versions of mlx-lm read alpha in "
            "different ways (scale * alpha / rank, or not at all): correct scale and take it out"
        )
    rank, scale, keys = given.get("rank"), given.get("scale"), given.get("keys")
    known = isinstance(scale, int | float) and not isinstance(scale, bool) and abs(scale) < 1e30
    if type(rank) is not int or rank < 1 or not known:
        raise LoraError(f"lora_parameters has rank {shown(rank)} and scale {shown(scale)}")
    named = isinstance(keys, list) and all(isinstance(k, str) for k in keys)
    if keys is not None and not named:
        raise LoraError(f"lora_parameters.keys is {shown(keys)}, expected names")
    return MlxConfig(method, rank, float(scale or 0), layers, None if keys is None else tuple(keys))
