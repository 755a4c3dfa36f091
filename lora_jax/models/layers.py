"""Parts that the models share: products, norms, embeddings, and stacks of equal layers."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lora_jax.models.config import LayersConfig, TextModelConfig, check_choice

_POLICIES: dict[str, Any] = {
    "full": None,  # jax.checkpoint's default: save only the layer's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

INITIAL = nn.initializers.normal(0.02)


def gelu(x: Array) -> Array:
    """The exact GELU, x Phi(x) (arXiv 1606.08415), by erf.

    `jax.nn.gelu` takes erfc, which keeps the relative precision of the left tail, and costs a
    CPU five times as much: two polynomials for every number.
    """
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


def dense(config: LayersConfig, features: int, name: str, *, bias: bool) -> nn.Dense:
    """Return a product with a kernel [in, out], in the dtypes of the config."""
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=INITIAL,
        name=name,
    )


def head_product(config: LayersConfig, features: int, name: str, *, bias: bool = True) -> nn.Dense:
    """Return a product of a classification head, in float32 for every dtype of the encoder."""
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=jnp.float32,
        param_dtype=config.param_dtype,
        kernel_init=INITIAL,
        name=name,
    )


class ClassifierHead(nn.Module):
    """A head of one product, `out`, on pooled hidden states [B, D]."""

    config: LayersConfig
    num_classes: int
    bias: bool = True

    @nn.compact
    def __call__(self, pooled: Array) -> Array:
        pooled = by_rows(pooled.astype(jnp.float32))
        return head_product(self.config, self.num_classes, "out", bias=self.bias)(pooled)


def kept_weights(config: LayersConfig, x: Array, deterministic: bool) -> Array | None:
    """Return the dropout of attention weights for x [B, T, D] as factors [B, N, T, T], or None.

    Call it inside `@nn.compact`.
    """
    if deterministic or config.attention_dropout == 0:
        return None
    shape = (x.shape[0], config.num_heads, x.shape[1], x.shape[1])
    return nn.Dropout(config.attention_dropout, deterministic=False)(jnp.ones(shape))


def heads(
    config: LayersConfig,
    x: Array,
    counts: Sequence[int],
    width: int,
    names: Sequence[str],
    *,
    fused: bool,
    bias: bool,
) -> list[Array]:
    """Compute queries, keys and values, [B, T, N, H] each, from x [B, T, D].

    `counts` are the numbers of heads N. If they are fused, they are one kernel `qkv` and not
    `names`.
    """
    sizes = [count * width for count in counts]
    if fused:
        *cuts, whole = itertools.accumulate(sizes)
        flat = jnp.split(dense(config, whole, "qkv", bias=bias)(x), cuts, axis=-1)
    else:
        flat = [
            dense(config, size, name, bias=bias)(x) for size, name in zip(sizes, names, strict=True)
        ]
    shapes = [(*x.shape[:2], count, width) for count in counts]
    return [one.reshape(shape) for one, shape in zip(flat, shapes, strict=True)]


class Mlp(nn.Module):
    """Computes down(activation(up)), or down(activation(gate) * up) if it is gated.

    If it is fused, gate and up are one kernel `gate_up`. `rate` is the dropout before the last
    product.
    """

    config: LayersConfig
    gated: bool = False
    fused: bool = False
    bias: bool = True
    rate: float = 0.0
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [B, T, D] to [B, T, D]."""
        config, act = self.config, ACTIVATIONS[self.config.activation]
        product = functools.partial(dense, config, bias=self.bias)
        if not self.gated:
            wide = act(product(config.mlp_size, "up")(x))
        elif self.fused:
            gate, up = jnp.split(product(2 * config.mlp_size, "gate_up")(x), 2, axis=-1)
            wide = act(gate) * up
        else:
            wide = act(product(config.mlp_size, "gate")(x)) * product(config.mlp_size, "up")(x)
        wide = nn.Dropout(self.rate, deterministic=self.deterministic)(wide)
        return product(config.hidden_size, "down")(wide)


class _RmsPlusOne(nn.Module):
    """An RMS norm that multiplies by 1 + scale and stays in float32 to the end, as Gemma's."""

    epsilon: float
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        gain = jnp.expand_dims(1 + scale.astype(jnp.float32), range(x.ndim - 1))
        return (wide * gain).astype(self.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "layer": nn.LayerNorm,
    "layer_without_bias": functools.partial(nn.LayerNorm, use_bias=False),
    "rms": nn.RMSNorm,
    "rms_plus_one": _RmsPlusOne,
}


def norm(config: LayersConfig, name: str, kind: str = "layer") -> Callable[[Array], Array]:
    """Return a norm over the last axis, one of `NORMS`, in the dtypes of the config."""
    made: Any = NORMS[kind](
        epsilon=config.norm_eps, dtype=config.dtype, param_dtype=config.param_dtype, name=name
    )
    return made


class Embed(nn.Module):
    """A table [rows, D] for lookups; if the head is tied, it is also a factor of a product.

    `tensor` is the axis of the table that is sharded over the mesh axis `tensor`.
    """

    config: LayersConfig
    rows: int
    tensor: int

    def setup(self) -> None:
        shape = (self.rows, self.config.hidden_size)
        self.embedding = self.param("embedding", INITIAL, shape, self.config.param_dtype)

    def __call__(self, index: Array) -> Array:
        # Gathered over `fsdp` first: if the table is sharded over both axes, and the rows of the
        # batch over `fsdp` as well, XLA replicates the activations.
        table = sharded(self.embedding, *([None] * self.tensor), "tensor")
        # The lookup comes before the cast, because a cast of the whole table would copy it.
        return jnp.take(table, index, axis=0).astype(self.config.dtype)


def noisy(module: nn.Module, config: TextModelConfig, x: Array, deterministic: bool) -> Array:
    """Add the noise of NEFTune (arXiv 2310.05914) to the embeddings x [B, T, D] of tokens.

    It is uniform within alpha / sqrt(T D) of zero, where T is the length of the rows, and has the
    rng named "dropout".
    """
    if deterministic or config.neftune == 0:
        return x
    most = config.neftune / math.sqrt(x.shape[1] * x.shape[2])
    return x + jax.random.uniform(module.make_rng("dropout"), x.shape, x.dtype, -most, most)


def tensor_axis(config: TextModelConfig) -> int:
    """Return the axis of the token embedding that `tensor` shards: 0 if 64 divides the rows."""
    return 0 if config.vocab_size % 64 == 0 else 1


def by_rows(x: Array) -> Array:
    """Shard the rows of activations [B, ...] over `fsdp` and `data`.

    Otherwise XLA may shard the activations like the weights: if kernels are sharded over `fsdp`, it
    gathers the batch and divides the hidden axis, and every device computes the whole attention.
    """
    return sharded(x, ("fsdp", "data"))


def sharded(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Shard each axis of `x` over the mesh axes (a name, several, None) given for it, and over no
    others.

    It uses the mesh in the context (`jax.set_mesh`). It does nothing without a mesh, if the mesh
    has none of the names, for mesh axes that are not of type Auto (inside a `shard_map`), or if an
    axis of x is not a multiple of its number of parts (such as a batch of one).
    """
    spec = partition(x.shape, *axes)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def partition(shape: Sequence[int], *axes: str | tuple[str, ...] | None) -> PartitionSpec | None:
    """Return how `sharded` divides an array of `shape`; None if not at all."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    known = {name for name, kind in types.items() if kind == jax.sharding.AxisType.Auto}
    asked = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
    kept = [tuple(name for name in names if name in known) for names in asked]
    parts = [math.prod(mesh.shape[name] for name in names) for names in kept]
    uneven = any(size % n for size, n in zip(shape, parts, strict=False))
    if not any(kept) or uneven:
        return None
    return PartitionSpec(*(names or None for names in kept))


def stack(
    block: type[nn.Module],
    config: LayersConfig,
    prefix: str,
    kinds: Sequence[int] | None = None,
    **fields: Any,
) -> Callable[..., Any]:
    """Return the layers of a model as one function of (x, *shared); call it inside `@nn.compact`.

    `block` is a module with `__call__(x, *shared) -> (x, None)` and the fields `config` and
    `fields`. Unrolled layers are named `{prefix}_0`, `{prefix}_1`, ...; scanned ones are named
    `layers` and have a leading axis of num_layers on every parameter. If layers differ in more than
    their parameters, `kinds` has the kind of each, the field `kind` of the block; scanned layers of
    several kinds are one program, and get their kind as the last argument, an int32 scalar.
    """
    check_choice("remat", config.remat, {"none": None, **_POLICIES})
    if config.remat != "none":
        # Under a scan, common subexpressions cannot be shared across layers anyway.
        policy = _POLICIES[config.remat]
        block = nn.remat(block, policy=policy, prevent_cse=not config.scan_layers)
    own: list[dict[str, Any]] = [{**fields} for _ in range(config.num_layers)]
    if kinds is not None:
        own = [{**fields, "kind": kind} for kind in kinds]

    def unrolled(x: Array, *shared: Any) -> Array:
        for index in range(config.num_layers):
            x, _ = block(config, name=f"{prefix}_{index}", **own[index])(x, *shared)
        return x

    def scanned(x: Array, *shared: Any) -> Array:
        differ = kinds is not None and len(set(kinds)) > 1
        axes: tuple[Any, ...] = (nn.broadcast,) * len(shared)
        if differ:
            shared, axes = (*shared, jnp.asarray(kinds, jnp.int32)), (*axes, 0)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=axes,
            length=config.num_layers,
        )
        x, _ = layers(config, name="layers", **own[0])(x, *shared)
        return x

    return scanned if config.scan_layers else unrolled
