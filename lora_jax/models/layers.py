"""A stack of equal layers, scanned or unrolled, with or without rematerialisation."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import Array

from lora_jax.models.config import Config, check_choice

_POLICIES: dict[str, Any] = {
    "full": None,  # jax.checkpoint's default: save nothing but the layer's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

INITIAL = nn.initializers.normal(0.02)


def dense(config: Config, features: int, name: str, *, bias: bool) -> nn.Dense:
    """A product with a 2-D kernel [in, out], in the dtypes of the configuration."""
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=INITIAL,
        name=name,
    )


def stack(block: type[nn.Module], config: Config, prefix: str, **fields: Any) -> Callable[..., Any]:
    """The layers of a model as one function of (x, *shared); call it inside `@nn.compact`.

    Args:
        block: a module with fields `config` and `fields`, and
            `__call__(x, *shared) -> (x, None)`.
        config: its num_layers, scan_layers and remat are read.
        prefix: unrolled layers are named `{prefix}_0`, `{prefix}_1`, ...; scanned ones are
            named `layers` and carry a leading axis of num_layers on every parameter.

    Raises:
        ValueError: `config.remat` is none of the known policies.
    """
    check_choice("remat", config.remat, {"none": None, **_POLICIES})
    if config.remat != "none":
        # Under a scan there is no common subexpression to be shared across the layers.
        policy = _POLICIES[config.remat]
        block = nn.remat(block, policy=policy, prevent_cse=not config.scan_layers)

    def unrolled(x: Array, *shared: Any) -> Array:
        for index in range(config.num_layers):
            x, _ = block(config, name=f"{prefix}_{index}", **fields)(x, *shared)
        return x

    def scanned(x: Array, *shared: Any) -> Array:
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * len(shared),
            length=config.num_layers,
        )
        x, _ = layers(config, name="layers", **fields)(x, *shared)
        return x

    return scanned if config.scan_layers else unrolled
