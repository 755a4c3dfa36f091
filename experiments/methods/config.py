"""The config of a run on text that trains by LoRA, or by a method that LoRA is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from experiments import methods
from lora_jax.errors import LoraError
from lora_jax.models.config import BuiltInConfig
from lora_jax.system.checked import Checked
from lora_jax.training.config import Config, ConfigError, LoraConfig, require
from lora_jax.training.method import Method
from lora_jax.training.text import TextConfig

LORA = "lora"
# Name of the method -> the function that makes it, and its settings with their defaults.
_METHODS: dict[str, tuple[Callable[..., Method], dict[str, int]]] = {
    LORA: (lambda config: methods.LORA, {}),
    "full": (methods.full, {}),
    "top_layers": (methods.top_layers, {"top_layers": 2}),
    "bitfit": (methods.bitfit, {}),
    "head": (methods.head, {}),
    "houlsby": (methods.houlsby, {"size": 64}),
    "pfeiffer": (methods.pfeiffer, {"size": 64}),
    "adapter_drop": (methods.adapter_drop, {"size": 64, "drop": 1}),
    "lin": (methods.lin, {"size": 64}),
    "prefix_embedding": (methods.prefix_embedding, {"prefix": 8, "infix": 8}),
    "prefix_layer": (methods.prefix_layer, {"prefix": 8, "infix": 8}),
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

    def on(self, config: BuiltInConfig, length: int) -> Method:
        """Return the method for a model whose longest row has `length` tokens."""
        make, settings = _METHODS[self.name][0], dict[str, Any](self.settings)
        if "prefix" in settings:
            settings["length"] = length
        try:
            made = make(config, **settings)
        except LoraError as error:
            raise ConfigError(f"method.name {self.name!r}: {error}") from error
        about = {} if self.name == LORA else {"method": {"name": self.name, **self.settings}}
        return dataclasses.replace(made, about=about)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodTextConfig(TextConfig):
    """A run that trains a pretrained language model on text, by LoRA or by another method."""

    method: MethodConfig = dataclasses.field(default=MethodConfig())
    """LoRA, or a method that it is compared with."""

    @classmethod
    def like(cls, config: TextConfig, **changes: Any) -> MethodTextConfig:
        """Return a config with the fields of `config`, and `changes`."""
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return cls(**{**fields, **changes})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method.name != LORA and self.start_from is not None:
            raise ConfigError(
                f"--from continues with LoRA adapters, and the method is {self.method.name!r}: "
                "leave one of the two out"
            )
        if self.method.name != LORA and self.lora.trainable is not None:
            raise ConfigError(
                f"lora.trainable is {self.lora.trainable}, but the method {self.method.name!r} "
                "decides what is trained: leave it at None, or method.name at 'lora'"
            )

    @property
    def adaptation(self) -> LoraConfig:
        """`lora`; with another method a config without adapters."""
        return self.lora if self.method.name == LORA else LoraConfig(targets=())

    def method_for(self, model: BuiltInConfig, length: int) -> Method:
        """See `TextConfig`."""
        return self.method.on(model, length)

    def full_fine_tuning(self, **changes: Any) -> Config:
        """See `Config`. The method is set to LoRA, because no other uses `lora.trainable`."""
        return super().full_fine_tuning(method=MethodConfig(), **changes)
