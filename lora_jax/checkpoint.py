"""Adapter-only checkpoints: the factors, their layout, and base parameters trained beside them.

Orbax does the writing (atomic: a path exists only when it is whole). This is the one file of the
core that names Orbax; what else needs it takes `ocp` from here, since its v1 names still move.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from lora_jax.adapters import Adapters, Factors, check
from lora_jax.errors import LoraError
from lora_jax.layout import Layout

Path = str | os.PathLike[str]


def save(
    path: Path,
    layout: Layout,
    adapters: Adapters,
    *,
    base: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write one adapter to the folder `path`: the factors and the layout, no base weight.

    Args:
      path: a folder that does not exist yet; any file system that Orbax writes to.
      layout: of the adapters.
      adapters: `{path: Factors(a, b)}`.
      base: base parameters trained beside the adapters (a head), as `frozen.split` gives them;
        `restore_base` reads them back.
      overwrite: replace what is at `path`.

    Raises:
      LoraError: the adapters do not fit the layout, or `path` exists.
    """
    check(layout, adapters)
    folder = _absolute(path)
    if folder.exists() and not overwrite:
        raise LoraError(f"{folder} exists; choose another path, or pass overwrite=True")
    trained = dict(base or {})
    meta = {
        "layout": layout.to_json(),
        "dtypes": {p: [_dtype(f.a), _dtype(f.b)] for p, f in adapters.items()},
        "base": {p: [list(jnp.shape(x)), _dtype(x)] for p, x in trained.items()},
    }
    tree = {"adapters": {p: {"a": f.a, "b": f.b} for p, f in adapters.items()}, "base": trained}
    parts: dict[str, Any] = {"meta": meta}
    if adapters or trained:
        parts["arrays"] = {k: v for k, v in tree.items() if v}
    ocp.save_checkpointables(folder, parts, overwrite=overwrite)


def restore(path: Path, shardings: Any = None) -> tuple[Layout, Adapters]:
    """Read what `save` wrote: `restore(save(x)) == x`, bit for bit.

    Args:
      path: the folder.
      shardings: where the factors go: None (one device), one `jax.sharding.Sharding` for all, or
        a tree like the adapters.

    Raises:
      LoraError: no adapter at `path`, or its parts contradict each other.
    """
    folder, layout, meta = _read_meta(path)
    target: dict[str, Any] = {}
    for t in layout.targets:
        a_dtype, b_dtype = meta["dtypes"][t.path]
        place = shardings[t.path] if isinstance(shardings, Mapping) else shardings
        a_place, b_place = place if isinstance(place, Factors) else (place, place)
        target[t.path] = {
            "a": _struct(t.a_shape, a_dtype, a_place),
            "b": _struct(t.b_shape, b_dtype, b_place),
        }
    loaded = _load(folder, "adapters", target)
    return layout, {p: Factors(**f) for p, f in loaded.items()}


def restore_base(path: Path, shardings: Any = None) -> dict[str, Any]:
    """The base parameters that were saved beside the adapters: `{path: array}`, maybe empty."""
    folder, _, meta = _read_meta(path)
    target = {
        p: _struct(shape, dtype, shardings[p] if isinstance(shardings, Mapping) else shardings)
        for p, (shape, dtype) in meta["base"].items()
    }
    return _load(folder, "base", target)


def restore_layout(path: Path) -> Layout:
    """The layout alone: small, and read without an array."""
    return _read_meta(path)[1]


def _read_meta(path: Path) -> tuple[epath.Path, Layout, dict[str, Any]]:
    folder = _absolute(path)
    if not folder.exists():
        near = [p.name for p in folder.parent.iterdir()] if folder.parent.exists() else []
        raise LoraError(f"no adapter at {folder}; its parent folder holds {sorted(near)[:10]}")
    try:
        meta = ocp.load_checkpointables(folder, {"meta": None})["meta"]
        return folder, Layout.from_json(meta["layout"]), meta
    except (ocp.errors.InvalidLayoutError, FileNotFoundError, KeyError, ValueError) as error:
        raise LoraError(f"{folder} is not an adapter that lora_jax.save wrote: {error}") from error


def _load(folder: epath.Path, part: str, target: dict[str, Any]) -> dict[str, Any]:
    if not target:
        return {}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        return ocp.load_checkpointables(folder, {"arrays": {part: target}})["arrays"][part]


def _struct(shape: Any, dtype: str, sharding: Any) -> jax.ShapeDtypeStruct:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=sharding)


def _dtype(x: Any) -> str:
    return jnp.dtype(jnp.asarray(x).dtype if isinstance(x, float | int) else x.dtype).name


def _absolute(path: Path) -> epath.Path:
    folder = epath.Path(path)
    return folder if "://" in str(path) else epath.Path(os.path.abspath(folder))
