"""The training method of a run: LoRA, or one that it is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from lora_jax import baselines
from lora_jax.errors import LoraError
from lora_jax.models import BertConfig, DecoderConfig
from lora_jax.system.checked import Checked
from lora_jax.training.config import ConfigError, require

LORA = "lora"
# Name of the method -> the function that makes it, and its settings with their defaults.
_METHODS: dict[str, tuple[Callable[..., baselines.Method], dict[str, int]]] = {
    LORA: (lambda config: baselines.NONE, {}),
    "full": (baselines.full, {}),
    "top_layers": (baselines.top_layers, {"top_layers": 2}),
    "bitfit": (baselines.bitfit, {}),
    "head": (baselines.head, {}),
    "houlsby": (baselines.houlsby, {"size": 64}),
    "pfeiffer": (baselines.pfeiffer, {"size": 64}),
    "adapter_drop": (baselines.adapter_drop, {"size": 64, "drop": 1}),
    "lin": (baselines.lin, {"size": 64}),
    "prefix_embedding": (baselines.prefix_embedding, {"prefix": 8, "infix": 8}),
    "prefix_layer": (baselines.prefix_layer, {"prefix": 8, "infix": 8}),
}
_LEAST = {"size": 1, "top_layers": 1, "prefix": 0, "infix": 0, "drop": 1}


@dataclasses.dataclass(frozen=True)
class MethodConfig(Checked):
    """The training method (docs/methods.md). A method other than LoRA does not use `lora`."""

    _path = "method."

    name: Literal[
        "lora",
        "full",
        "top_layers",
        "bitfit",
        "head",
        "houlsby",
        "pfeiffer",
        "adapter_drop",
        "lin",
        "prefix_embedding",
        "prefix_layer",
    ] = "lora"
    """lora; full fine-tuning; top_layers, the last layers; bitfit, all biases; head, only the new
    head; adapter layers by houlsby, pfeiffer, adapter_drop or lin; prefix_embedding and
    prefix_layer."""
    size: int | None = None
    """Adapter layers: width of the bottleneck. None: 64."""
    top_layers: int | None = None
    """top_layers: how many layers are trained, counted from the output. None: 2."""
    prefix: int | None = None
    """Prefixes: the number of learned tokens before the text. None: 8."""
    infix: int | None = None
    """Prefixes: the number of learned tokens after the text. None: 8."""
    drop: int | None = None
    """adapter_drop: the number of layers without adapter, counted from the input. None: 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in _LEAST.items():
            value = getattr(self, field)
            if value is None:
                continue
            if field not in _METHODS[self.name][1]:
                having = [name for name, (_, settings) in _METHODS.items() if field in settings]
                raise ConfigError(
                    f"method.{field} is a setting of {', '.join(having)}, and method.name is "
                    f"{self.name!r}: leave it out, or name one of them"
                )
            require(value >= least, f"method.{field}", value, f"at least {least}")

    @property
    def settings(self) -> dict[str, int]:
        """The settings of this method, by name, with defaults filled in."""
        defaults = _METHODS[self.name][1]
        given = {field: getattr(self, field) for field in defaults}
        return {f: defaults[f] if value is None else value for f, value in given.items()}

    def on(self, config: BertConfig | DecoderConfig, length: int) -> baselines.Method:
        """Return the method for a model. LoRA is a method that trains nothing of its own.

        Args:
          config: the config of the model.
          length: the number of tokens of the longest row.

        Returns:
          The method.

        Raises:
          ConfigError: the method does not work with the model.
        """
        make, settings = _METHODS[self.name][0], dict[str, Any](self.settings)
        if "prefix" in settings:
            settings["length"] = length
        try:
            return make(config, **settings)
        except LoraError as error:
            raise ConfigError(f"method.name {self.name!r}: {error}") from error
