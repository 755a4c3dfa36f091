"""A method defines which parameters are trained, and what is added to the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
from jax import Array

from experiments.methods import sites
from experiments.methods.bottleneck import Bottleneck
from experiments.methods.prefix import Prefix
from experiments.methods.sites import Tree
from lora_jax.checkpoint.saved_adapter import EXTRA
from lora_jax.errors import LoraError
from lora_jax.models.config import BertConfig, BuiltInConfig
from lora_jax.training import method as base


@dataclasses.dataclass(frozen=True)
class Method(base.Method):
    """A method that trains other parameters than LoRA's factors.

    Attributes:
      extra: the modules that are added to the model. None: nothing.
    """

    extra: Bottleneck | Prefix | None = None

    def init(self, key: Array) -> Tree:
        """Return fresh parameters of the method: `{"extra": ...}` or `{}`."""
        return {} if self.extra is None else {EXTRA: self.extra.init(key)}

    def apply(self, model: nn.Module, params: Tree, *args: Any, **kwargs: Any) -> Any:
        """Call `model.apply({"params": ...}, *args, **kwargs)` with the method's additions."""
        if self.extra is None:
            return super().apply(model, params, *args, **kwargs)
        own = {name: value for name, value in params.items() if name != EXTRA}
        with self.extra.around(params[EXTRA]):
            return model.apply({"params": own}, *args, **kwargs)


def full(config: BuiltInConfig) -> Method:
    """Return full fine-tuning, which trains every parameter."""
    return Method(("**",))


def top_layers(config: BuiltInConfig, top_layers: int) -> Method:
    """Return the method that trains the last `top_layers` layers.

    Source: FT-Top2 of Li and Liang, arXiv 2101.00190.
    """
    layers = sites.layers(config)
    if not 0 < top_layers <= len(layers):
        raise LoraError(f"method.top_layers must be from 1 to {len(layers)}, got {top_layers}")
    return Method(tuple(f"{layer}/**" for layer in layers[-top_layers:]))


def bitfit(config: BuiltInConfig) -> Method:
    """Return BitFit, which trains every bias vector, also in norms.

    Source: Ben-Zaken et al., arXiv 2106.10199.
    """
    return Method((sites.biases(config),))


def head(config: BuiltInConfig) -> Method:
    """Return the method that trains only the new head, as a probe of the frozen model."""
    if not isinstance(config, BertConfig):
        raise LoraError("a decoder has no new head to be trained alone; take another method")
    return Method()


def houlsby(config: BuiltInConfig, size: int) -> Method:
    """Return adapter layers after attention and after the MLP, before the residual.

    All norms are trained as well. The activation is GELU, as in the authors' code.

    Source: Adapter^H, Houlsby et al., arXiv 1902.00751.
    """
    modules = tuple(f"{layer}/{m}" for layer in sites.layers(config) for m in ("attention", "mlp"))
    extra = Bottleneck(modules, config.hidden_size, size, "gelu")
    return Method((f"{EXTRA}/**", sites.norms(config)), extra=extra)


def pfeiffer(config: BuiltInConfig, size: int) -> Method:
    """Return adapter layers after the MLP, before the residual.

    Source: Adapter^P, Pfeiffer et al., arXiv 2005.00247.
    """
    return _after_mlp(config, size)


def adapter_drop(config: BuiltInConfig, size: int, drop: int) -> Method:
    """Return `pfeiffer` without the adapter layers of the first `drop` layers.

    Source: Adapter^D, Rücklé et al., arXiv 2010.11918.
    """
    count = config.num_layers
    if not 0 < drop < count:
        raise LoraError(
            f"method.drop must be from 1 to {count - 1}, because one of the {count} layers must "
            f"keep its adapter; got {drop}"
        )
    return _after_mlp(config, size, drop)


def lin(config: BuiltInConfig, size: int) -> Method:
    """Return adapter layers after the MLP, before the residual, each with its own layer norm.

    Source: Adapter^L, Lin et al., arXiv 2004.03829.
    """
    return _after_mlp(config, size, norm=True)


def _after_mlp(config: BuiltInConfig, size: int, drop: int = 0, norm: bool = False) -> Method:
    modules = tuple(f"{layer}/mlp" for layer in sites.layers(config)[drop:])
    return Method((f"{EXTRA}/**",), extra=Bottleneck(modules, config.hidden_size, size, norm=norm))


def prefix_embedding(config: BuiltInConfig, prefix: int, infix: int, length: int) -> Method:
    """Return learned word embeddings of special tokens before and after each row."""
    return _prefix(config, prefix, infix, length)


def prefix_layer(config: BuiltInConfig, prefix: int, infix: int, length: int) -> Method:
    """Return `prefix_embedding` with learned vectors at the input of every layer."""
    return _prefix(config, prefix, infix, length, sites.layers(config))


def _prefix(
    config: BuiltInConfig, prefix: int, infix: int, length: int, layers: tuple[str, ...] = ()
) -> Method:
    if not isinstance(config, BertConfig):
        raise LoraError(
            "prefixes are for encoders: a decoder trains on packed rows of several prompts, for "
            "which they are not implemented. For a decoder, use full, top_layers, bitfit, houlsby, "
            "pfeiffer, lin or adapter_drop"
        )
    if prefix + infix < 1:
        raise LoraError("method.prefix + method.infix must be at least 1, got 0")
    if length + prefix + infix > config.max_positions:
        raise LoraError(
            f"rows of {length} tokens with {prefix} + {infix} learned ones are longer than the "
            f"{config.max_positions} positions of the model; lower --data.max-length to "
            f"{max(config.max_positions - prefix - infix, 1)}, or --method.prefix and "
            "--method.infix"
        )
    extra = Prefix(sites.ENCODER, config.hidden_size, prefix, infix, layers)
    return Method((f"{EXTRA}/**",), extra=extra)
