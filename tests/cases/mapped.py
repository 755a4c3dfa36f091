"""Weights inside shard_map, over 8 devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from tests.cases.case import case, normal


def _mapped(body: Any, *specs: Any, check_vma: bool = True) -> Any:
    *in_specs, out_specs = specs
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    return jax.shard_map(
        body, mesh=mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=check_vma
    )


@case
def shard_map_column_and_row_parallel() -> Any:
    """A Megatron pair: one product is sharded by outputs, the next by inputs; then one sum."""

    def body(up: Any, down: Any, x: Any) -> Any:
        return jax.lax.psum(jnp.tanh(x @ up) @ down, "tensor")

    rows = P(("data", "fsdp"))
    mapped = _mapped(body, P(None, "tensor"), P("tensor"), rows, rows)
    params = {"up": normal(0, 10, 14), "down": normal(1, 14, 10)}
    f = lambda p, x: mapped(p["up"], p["down"], x)  # noqa: E731
    return f, params, (normal(2, 4, 10),), ("up", "down"), {"batched": False}


@case
def shard_map_contracted_over_two_axes() -> Any:
    def body(w: Any, x: Any) -> Any:
        return jax.lax.psum(x @ w, ("fsdp", "tensor"))

    mapped = _mapped(body, P(("fsdp", "tensor")), P("data", ("fsdp", "tensor")), P("data"))
    f = lambda p, x: mapped(p["w"], x)  # noqa: E731
    return f, {"w": normal(0, 12, 14)}, (normal(1, 4, 12),), ("w",), {"batched": False}


def _gathered(check_vma: bool) -> Any:
    """The body gathers its weights over `fsdp`, along their inputs and along their outputs."""

    def body(up: Any, down: Any, x: Any) -> Any:
        up = jax.lax.all_gather(up, "fsdp", axis=0, tiled=True)
        down = jax.lax.all_gather(down, "fsdp", axis=1, tiled=True)
        return jax.lax.psum(jnp.tanh(x @ up) @ down, "tensor")

    rows = P(("data", "fsdp"))
    mapped = _mapped(
        body, P("fsdp", "tensor"), P("tensor", "fsdp"), rows, rows, check_vma=check_vma
    )
    params = {"up": normal(0, 10, 14), "down": normal(1, 14, 10)}
    f = lambda p, x: mapped(p["up"], p["down"], x)  # noqa: E731
    return f, params, (normal(2, 4, 10),), ("up", "down"), {"batched": False}


@case
def shard_map_all_gather() -> Any:
    return _gathered(check_vma=True)


@case
def shard_map_all_gather_unchecked() -> Any:
    return _gathered(check_vma=False)


@case
def shard_map_over_scanned_layers() -> Any:
    """One mesh axis is mapped and XLA handles the others; the body slices the layer axis."""

    def body(layers: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jnp.tanh(jax.lax.psum(x @ w["up"], "tensor") @ w["down"]), None

        x, _ = jax.lax.scan(layer, x, layers)
        return jax.lax.all_gather(x, "tensor", axis=1, tiled=True)

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"up": P(None, "tensor", None), "down": P(None, None, "tensor")}
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(specs, P(None, "tensor")),
        out_specs=P(),
        axis_names={"tensor"},
        check_vma=False,
    )
    params = {"up": normal(0, 3, 10, 14) / 4, "down": normal(1, 3, 14, 10) / 4}
    f = lambda p, x: jax.jit(mapped)(p, x)  # noqa: E731
    return f, params, (normal(2, 4, 10),), ("up", "down"), {"batched": False}
