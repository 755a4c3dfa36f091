"""Adapters of mlx-lm: a folder with adapters.safetensors and adapter_config.json.

adapter = mlx.load(folder, names, f, params, *args)
mlx.save(folder, names, adapter)

Keys are the model's module names without a prefix. A factor is stored as it multiplies x:

    <module>.lora_a   [in, rank]; of experts (<module> ends with switch_mlp.<projection>)
                      [experts, rank, in]; of an embedding [vocabulary, rank]
    <module>.lora_b   [rank, out]; of experts [experts, out, rank]
    <module>.m        [out], the lengths of DoRA

mlx-lm refuses a tensor with another rank, or of a module that the configuration does not name.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.adapters import Adapter
from lora_jax.errors import LoraError, naming
from lora_jax.exchange import expert_stacks, tensor_file
from lora_jax.exchange.into_adapter import into_adapter
from lora_jax.exchange.module_update import (
    Modules,
    ModuleUpdate,
    at_one_rank,
    by_module,
    check_plain,
)
from lora_jax.exchange.names import NameTable
from lora_jax.exchange.out_of_adapter import out_of_adapter
from lora_jax.exchange.tensor_file import shown
from lora_jax.models.hf_module import HfNames
from lora_jax.system.whole_files import write_together

CONFIG, TENSORS = "adapter_config.json", "adapters.safetensors"
FACTORS = ("lora_a", "lora_b", "m")
_LAYER = re.compile(r".*?\.(\d+)\.(.*)")  # the number of a layer, and a module's name inside it


def load(
    folder: str | os.PathLike[str],
    names: HfNames | None,
    f: Callable[..., Any],
    params: Any,
    *args: Any,
) -> Adapter:
    """Read an adapter that mlx-lm, or `save`, wrote.

    Args:
      folder: the folder with the two files.
      names, f, params, *args: as for `lora_jax.exchange.peft.load`. The names are the ones
        in MLX's model, which for most models are Hugging Face's.

    Returns:
      The adapter. Parameters of a full fine-tuning are in `trainable`.

    Raises:
      LoraError: a damaged folder, a setting or tensor that mlx-lm would not apply, or a module that
        the model does not have.
    """
    place = pathlib.Path(folder)
    for name in (CONFIG, TENSORS):
        if not (place / name).is_file():
            raise LoraError(f"{place} has no {name}; a folder of PEFT is read by exchange.peft")
    with naming(place / CONFIG):
        config = _parse(tensor_file.read_json(place / CONFIG))
    tensors = {
        k: x.astype(np.float32) for k, x in tensor_file.read(place / TENSORS).tensors.items()
    }
    with naming(place / TENSORS):
        table = NameTable.of(names, params)
        whole = config.method == "full"
        modules = Modules({}, tensors) if whole else Modules(_updates(tensors, config))
        # In MLX, an embedding that is also the output head is one module: both uses change.
        return into_adapter(modules._replace(ties=True), table, f, params, args)


def save(
    folder: str | os.PathLike[str],
    names: HfNames | None,
    adapter: Adapter,
    *,
    params: Any = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Write an adapter as a folder that mlx-lm loads (`--adapter-path`).

    Args:
      folder: the folder for the two files, which are all that is written.
      names: as for `load`.
      adapter: an `Adapter`, or a tuple of its first fields. Kinds other than LoRA and DoRA are
        written as the LoRA that they are equal to. Ranks and scales that differ become one.
      params: the base parameters, which some adapters need (see `peft.save`).
      overwrite: replace an adapter in the folder.

    Returns:
      The path of the folder.

    Raises:
      LoraError: an adapter that mlx-lm cannot apply: biases, whole tensors, convolutions, DoRA of
        an embedding or of only some modules.
    """
    place = pathlib.Path(folder)
    if (place / CONFIG).exists() and not overwrite:
        raise LoraError(f"{place} holds an adapter; choose another, or pass overwrite=True")
    table, modules = out_of_adapter(names, adapter, params)
    check_plain(modules, "an adapter of MLX", ("linear", "experts", "embedding"), dora=True)
    updates = at_one_rank({n: u for n, u in modules.updates.items() if not _is_tied(table, n)})
    lengths = {n: u.magnitude for n, u in updates.items() if u.magnitude is not None}
    if lengths and len(lengths) < len(updates):
        raise LoraError(
            f"{next(iter(lengths))!r} is adapted by DoRA and others are not, and MLX has one "
            "setting for all; adapt all by one kind, or write two adapters"
        )
    tensors = {f"{name}.m": x for name, x in lengths.items()}
    keys = set()
    for module, (a, b) in expert_stacks.stack(updates).items():
        name = module.replace(".experts.", ".switch_mlp.")
        a, b = (a, b) if a.ndim == 3 else (a.T, b.T)
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        keys.add(_key(name))
    one = next(iter(updates.values()))
    settings = {
        "fine_tune_type": "dora" if lengths else "lora",
        "num_layers": -1,
        "lora_parameters": {"rank": one.rank, "scale": one.scale, "dropout": 0.0}
        | {"keys": sorted(keys)},
    }
    tensors = {k: np.ascontiguousarray(x, np.float32) for k, x in tensors.items()}
    writers = tensor_file.folder_writers(TENSORS, tensors, {"format": "mlx"}, CONFIG, settings)
    write_together(place, writers)
    return place


def _is_tied(table: NameTable, module: str) -> bool:
    """Return whether a module is an output head that shares an embedding; MLX has none."""
    places = table.find(f"{module}.weight")
    return bool(places) and all(place.tied for place in places)


def _key(module: str) -> str:
    """Return the module's name inside its layer, or its whole name."""
    match = _LAYER.fullmatch(module)
    return match[2] if match else module


def _updates(tensors: Mapping[str, np.ndarray], config: _Config) -> dict[str, ModuleUpdate]:
    grouped = by_module(tensors, FACTORS[: 3 if config.method == "dora" else 2])
    _check_layers(grouped, config)
    found: dict[str, ModuleUpdate] = {}
    names = set(config.keys or ())
    for module, keys in grouped.items():
        if config.keys is not None and not {_key(module), module} & names:
            raise LoraError(
                f"{module!r} is not among lora_parameters.keys {shown(config.keys)}, "
                f"and mlx-lm would not load it; correct {CONFIG}"
            )
        a, b, m = (tensors[keys[part]] if part in keys else None for part in FACTORS)
        assert a is not None and b is not None
        name = module.replace(".switch_mlp.", ".experts.")
        if a.ndim == 2:
            a, b = a.T, b.T
        for each, each_a, each_b in expert_stacks.unstack(name, a, b):
            if len(each_a) != config.rank or (m is not None and m.shape != each_b.shape[:1]):
                raise LoraError(
                    f"{module!r} has rank {len(each_a)} and {len(each_b)} outputs, m has "
                    f"{None if m is None else m.shape}; {CONFIG} says rank {config.rank}"
                )
            alpha = config.scale * config.rank
            found[each] = ModuleUpdate(each_a, each_b, alpha, magnitude=m)
    return found


def _check_layers(modules: Mapping[str, Any], config: _Config) -> None:
    """Raise `LoraError` if the file has other layers than the last `num_layers`."""
    numbers = [int(match[1]) for name in modules if (match := _LAYER.fullmatch(name))]
    if numbers and 0 < config.layers < max(numbers) - min(numbers) + 1:
        raise LoraError(
            f"layers {min(numbers)} to {max(numbers)} are adapted, and num_layers is "
            f"{config.layers}: mlx-lm would not load the first; correct {CONFIG}"
        )


class _Config(NamedTuple):
    """The settings that decide the function; all others are the history of a training run.

    method: fine_tune_type: "lora", "dora" or "full".
    rank, scale: of all modules; the scale is the factor itself.
    layers: num_layers, the number of adapted layers, counted from the last; -1: all.
    keys: the names of the adapted modules, inside a layer or in full; None: all.
    """

    method: str
    rank: int
    scale: float
    layers: int
    keys: tuple[str, ...] | None


def _parse(settings: Mapping[str, Any]) -> _Config:
    """Return the settings that decide the function."""
    method = settings.get("fine_tune_type", "lora")
    if "peft_type" in settings or method not in ("lora", "dora", "full"):
        raise LoraError(
            f"fine_tune_type is {shown(method)!r}, expected 'lora', 'dora' or 'full'; a "
            "configuration with peft_type is read by exchange.peft"
        )
    if method == "full":
        return _Config(method, 0, 1.0, -1, None)
    given, layers = settings.get("lora_parameters"), settings.get("num_layers")
    if not isinstance(given, dict) or type(layers) is not int:
        raise LoraError("expected lora_parameters {rank, scale, dropout, keys} and num_layers")
    other = set(given) - {"rank", "scale", "dropout", "keys"}
    if other:
        raise LoraError(
            f"lora_parameters has {shown(sorted(other))}; versions of mlx-lm read alpha in "
            "different ways (scale * alpha / rank, or not at all): correct scale and take it out"
        )
    rank, scale, keys = given.get("rank"), given.get("scale"), given.get("keys")
    known = isinstance(scale, int | float) and not isinstance(scale, bool) and abs(scale) < 1e30
    if type(rank) is not int or rank < 1 or not known:
        raise LoraError(f"lora_parameters has rank {shown(rank)} and scale {shown(scale)}")
    named = isinstance(keys, list) and all(isinstance(k, str) for k in keys)
    if keys is not None and not named:
        raise LoraError(f"lora_parameters.keys is {shown(keys)}, expected names")
    return _Config(method, rank, float(scale or 0), layers, None if keys is None else tuple(keys))
