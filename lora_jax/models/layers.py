"""Stack equal layers, scanned or unrolled, with or without rematerialisation."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from lora_jax.models.config import BuiltInConfig, check_choice

_POLICIES: dict[str, Any] = {
    "full": None,  # jax.checkpoint's default: save nothing but the layer's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

INITIAL = nn.initializers.normal(0.02)


def dense(config: BuiltInConfig, features: int, name: str, *, bias: bool) -> nn.Dense:
    """A product with a 2-D kernel [in, out], in the dtypes of the configuration."""
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=INITIAL,
        name=name,
    )


class Embed(nn.Module):
    """A table [rows, D] that is looked up, and multiplied with where it is a tied head too.

    Attributes:
        tensor: the axis of the table that the mesh axis `tensor` divides.
    """

    config: BuiltInConfig
    rows: int
    tensor: int

    def setup(self) -> None:
        shape = (self.rows, self.config.hidden_size)
        self.embedding = self.param("embedding", INITIAL, shape, self.config.param_dtype)

    def __call__(self, index: Array) -> Array:
        # Brought together over `fsdp` first: of a table in both ways in parts, and rows that lie
        # over `fsdp` too, XLA replicates the activations.
        table = divided(self.embedding, *([None] * self.tensor), "tensor")
        # Looked up before the cast: casting the whole table would copy it.
        return jnp.take(table, index, axis=0).astype(self.config.dtype)


def tensor_axis(config: BuiltInConfig) -> int:
    """Which axis of the token embedding `tensor` divides: the vocabulary where 64 divides it."""
    return 0 if config.vocab_size % 64 == 0 else 1


def by_rows(x: Array) -> Array:
    """Activations [B, ...] with their rows divided over `fsdp` and `data`.

    Without it XLA may lay the activations out like the weights: with kernels cut over `fsdp` it
    gathers the batch and divides the hidden axis, and every device computes all of the attention.
    """
    return divided(x, ("fsdp", "data"))


def divided(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """`x` with each axis divided over the mesh axes named for it, and over no other.

    The mesh is the one in context (`jax.set_mesh`). Nothing is done without one, where it has none
    of the names, for mesh axes that are not of type Auto (inside a `shard_map`), or where an axis
    of x is not a multiple of its parts (a batch of one).
    """
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    known = {name for name, kind in types.items() if kind == jax.sharding.AxisType.Auto}
    asked = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
    kept = [tuple(name for name in names if name in known) for names in asked]
    parts = [math.prod(mesh.shape[name] for name in names) for names in kept]
    uneven = any(size % n for size, n in zip(x.shape, parts, strict=False))
    if not any(kept) or uneven:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(names or None for names in kept)))


def stack(
    block: type[nn.Module], config: BuiltInConfig, prefix: str, **fields: Any
) -> Callable[..., Any]:
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
