"""A method: which parameters it trains, and what it puts into the model."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jax import Array
from jax.sharding import PartitionSpec

from lora_jax.baselines import sites
from lora_jax.baselines.bottleneck import Bottleneck
from lora_jax.baselines.prefix import Prefix
from lora_jax.baselines.sites import Tree
from lora_jax.errors import LoraError
from lora_jax.models.config import BertConfig, BuiltInConfig

EXTRA = "extra"  # the key of a method's own parameters, beside those of the model


@dataclasses.dataclass(frozen=True)
class Method:
    """What is trained in place of LoRA's factors, the new head of an encoder aside.

    Attributes:
      trained: patterns (`lora_jax.paths`) of the parameters, the method's own among them.
      extra: what it puts into the model. None: nothing.
    """

    trained: tuple[str, ...] = ()
    extra: Bottleneck | Prefix | None = None

    def init(self, key: Array) -> Tree:
        """Fresh parameters of its own, to be put beside the model's: `{"extra": ...}` or `{}`."""
        return {} if self.extra is None else {EXTRA: self.extra.init(key)}

    def shapes(self) -> Tree:
        """What `init` gives, as ShapeDtypeStructs."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def placement(self) -> tuple[tuple[str, PartitionSpec], ...]:
        """A rule for its own parameters, as those of `lora_jax.models.placement`: they lie whole
        on every device, being few."""
        return () if self.extra is None else ((f"{EXTRA}/**", PartitionSpec()),)

    def apply(self, model: nn.Module, params: Tree, *args: Any, **kwargs: Any) -> Any:
        """`model.apply({"params": ...}, *args, **kwargs)` with what the method puts into it.

        Args:
          model: an unmodified model of `lora_jax.models`.
          params: its parameters and, under `EXTRA`, those of the method.
        """
        if self.extra is None:
            return model.apply({"params": params}, *args, **kwargs)
        base = {name: value for name, value in params.items() if name != EXTRA}
        with self.extra.around(params[EXTRA]):
            return model.apply({"params": base}, *args, **kwargs)


# Of LoRA: its factors are no parameters of the model.
NONE = Method()


def full(config: BuiltInConfig) -> Method:
    """Every parameter: full fine-tuning."""
    return Method(("**",))


def top_layers(config: BuiltInConfig, top_layers: int) -> Method:
    """The `top_layers` layers farthest from the input (FT-Top2 of Li and Liang, arXiv 2101.00190).

    Raises:
      LoraError: there are not so many, or they are scanned.
    """
    layers = sites.layers(config)
    if not 0 < top_layers <= len(layers):
        raise LoraError(f"method.top_layers must be from 1 to {len(layers)}, got {top_layers}")
    return Method(tuple(f"{layer}/**" for layer in layers[-top_layers:]))


def bitfit(config: BuiltInConfig) -> Method:
    """Every bias vector, those of the norms too (Ben-Zaken et al., arXiv 2106.10199).

    Raises:
      LoraError: the model has none.
    """
    return Method((sites.biases(config),))


def head(config: BuiltInConfig) -> Method:
    """Nothing but the new head: a probe of the frozen model.

    Raises:
      LoraError: a decoder, which has no new head.
    """
    if not isinstance(config, BertConfig):
        raise LoraError("a decoder has no new head to be trained alone; take another method")
    return Method()


def houlsby(config: BuiltInConfig, size: int) -> Method:
    """Adapter layers after attention and after the MLP, before the residual; all norms trained.

    Adapter^H: Houlsby et al., arXiv 1902.00751. Gelu, as in their code.

    Raises:
      LoraError: the layers are scanned.
    """
    modules = tuple(f"{layer}/{m}" for layer in sites.layers(config) for m in ("attention", "mlp"))
    extra = Bottleneck(modules, config.hidden_size, size, "gelu")
    return Method((f"{EXTRA}/**", sites.norms(config)), extra)


def pfeiffer(config: BuiltInConfig, size: int) -> Method:
    """Adapter layers after the MLP, before the residual.

    Adapter^P: Pfeiffer et al., arXiv 2005.00247.

    Raises:
      LoraError: the layers are scanned.
    """
    return _after_mlp(config, size)


def adapter_drop(config: BuiltInConfig, size: int, drop: int) -> Method:
    """`pfeiffer` without the adapter layers of the `drop` layers nearest to the input.

    Adapter^D: Rücklé et al., arXiv 2010.11918.

    Raises:
      LoraError: that leaves none, or the layers are scanned.
    """
    count = config.num_layers
    if not 0 < drop < count:
        raise LoraError(
            f"method.drop must be from 1 to {count - 1}, for one of the {count} layers has to keep "
            f"its adapter; got {drop}"
        )
    return _after_mlp(config, size, drop)


def lin(config: BuiltInConfig, size: int) -> Method:
    """Adapter layers after the MLP, before the residual, each with a layer norm of its own.

    Adapter^L: Lin et al., arXiv 2004.03829.

    Raises:
      LoraError: the layers are scanned.
    """
    return _after_mlp(config, size, norm=True)


def _after_mlp(config: BuiltInConfig, size: int, drop: int = 0, norm: bool = False) -> Method:
    modules = tuple(f"{layer}/mlp" for layer in sites.layers(config)[drop:])
    return Method((f"{EXTRA}/**",), Bottleneck(modules, config.hidden_size, size, norm=norm))


def prefix_embedding(config: BuiltInConfig, prefix: int, infix: int, length: int) -> Method:
    """Learned word embeddings of `prefix` special tokens before a row and `infix` behind it.

    Args:
      length: tokens of the longest row without them.

    Raises:
      LoraError: a decoder, no token at all, or more than the model has positions for.
    """
    return _prefix(config, prefix, infix, length)


def prefix_layer(config: BuiltInConfig, prefix: int, infix: int, length: int) -> Method:
    """`prefix_embedding` with learned vectors at the input of every layer.

    Raises:
      LoraError: as `prefix_embedding`; the layers are scanned.
    """
    return _prefix(config, prefix, infix, length, sites.layers(config))


def _prefix(
    config: BuiltInConfig, prefix: int, infix: int, length: int, layers: tuple[str, ...] = ()
) -> Method:
    if not isinstance(config, BertConfig):
        raise LoraError(
            "prefixes are for encoders: a decoder trains on packed rows, each of several prompts, "
            "and there they are not built. On a decoder full, top_layers, bitfit, houlsby, "
            "pfeiffer, lin and adapter_drop work"
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
    return Method((f"{EXTRA}/**",), extra)
