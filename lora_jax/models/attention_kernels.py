"""Attention by kernels that keep no scores: splash attention on a TPU, cuDNN's on a CUDA GPU.

Each takes whole rows, whose tokens see by their order in the row. No kernel takes a bias or a
dropout of the weights. tokamax was looked at (0.0.12): its public function takes packed rows as a
mask [T, S] only, whose memory is what a kernel is for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from lora_jax.models.layers import partition
from lora_jax.models.sight import Sight

Attention = Callable[[Array, Array, Array, Sight], Array]
TILES = (512, 256, 128)  # of splash attention; the largest that divides the length


def fitting(
    query: Array, key: Array, sight: Sight, *, scale: float, cap: float | None
) -> dict[str, Attention]:
    """Return the kernels that take a query [B, T, N, H] and a key [B, S, K, H], by platform."""
    whole_rows = sight.rows is None and sight.columns is None and sight.reach is None
    if not whole_rows or query.shape[1] != key.shape[1]:
        return {}
    found: dict[str, Attention] = {}
    if query.shape[1] % TILES[-1] == 0:
        found["tpu"] = functools.partial(splash, scale=scale, cap=cap)
    if cap is None and sight.real is None and sight.segments is None:
        cudnn = functools.partial(_cudnn, scale=scale)
        if _is_taken(cudnn, query, key, sight):
            found["cuda"] = cudnn
    return found


def _cudnn(query: Array, key: Array, value: Array, sight: Sight, *, scale: float) -> Array:
    window = None if sight.window is None else sight.window - 1
    sides = None if window is None else (window, 0 if sight.causal else window)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=sight.causal,
        local_window_size=sides,
        implementation="cudnn",
    )


def _is_taken(cudnn: Attention, query: Array, key: Array, sight: Sight) -> bool:
    """Whether cuDNN is installed and takes these widths, types and windows."""
    try:
        jax.eval_shape(cudnn, query, key, key, sight)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


def splash(
    query: Array,
    key: Array,
    value: Array,
    sight: Sight,
    *,
    scale: float,
    cap: float | None,
    interpret: bool = False,
) -> Array:
    """Attend by the TPU kernel of `jax.experimental.pallas`, each device to its rows and heads.

    XLA does not divide such a kernel itself, so under a mesh it runs in a `shard_map`: rows over
    `fsdp` and `data`, heads over `tensor`, where they divide.
    """
    ids = sight.segments
    if sight.real is not None:  # padding is a segment of its own, so each token sees at least one
        ids = jnp.where(sight.real, 0 if ids is None else ids, -1)
    if ids is not None:
        ids = jnp.broadcast_to(ids, query.shape[:2]).astype(jnp.int32)
    run = functools.partial(_splash, causal=sight.causal, window=sight.window, cap=cap)
    run = functools.partial(run, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    auto = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Auto
    }
    if auto:
        rows = partition(query.shape, ("fsdp", "data")) or PartitionSpec(None)
        groups = partition(key.shape, None, None, "tensor") or PartitionSpec(None, None, None)
        arrays = PartitionSpec(*rows, None, groups[2])
        run = jax.shard_map(
            run,
            in_specs=(arrays, arrays, arrays, PartitionSpec(*rows)),
            out_specs=arrays,
            axis_names=auto,
            check_vma=False,
        )
    return run(query * scale, key, value, ids)


def _splash(
    query: Array,
    key: Array,
    value: Array,
    ids: Array | None,
    *,
    causal: bool,
    window: int | None,
    cap: float | None,
    interpret: bool,
) -> Array:
    """Attend with the rows and heads of one device; a query is scaled already."""
    # They take a second to import, and only a program with long rows needs them.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = query.shape[1:3]
    seen: masks.Mask = masks.FullMask((length, length))
    if causal or window is not None:
        before = None if window is None else window - 1
        seen = masks.LocalMask((length, length), (before, 0 if causal else before), offset=0)
    tile = next(size for size in TILES if length % size == 0)
    tiles = kernels.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
    )
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([seen] * heads),
        block_sizes=tiles,
        attn_logits_soft_cap=cap,
        interpret=interpret,
    )

    def of_row(query: Array, key: Array, value: Array, ids: Array | None) -> Array:
        return kernel(query, key, value, None if ids is None else kernels.SegmentIds(ids, ids))

    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    return jax.vmap(of_row)(query, key, value, ids).swapaxes(1, 2).astype(value.dtype)
