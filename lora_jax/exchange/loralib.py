"""State dicts of Microsoft's loralib, read only.

qkv = {"*.attn.c_attn": (True, False, True)}
adapter = loralib.load(state, names, f, params, *args, alpha=32, enable_lora=qkv)

The input is the result of `loralib.lora_state_dict(model, bias=...)`, as a mapping of arrays or a
safetensors file:

    <module>.lora_A   [rank, in]; of an embedding [rank, vocabulary]
    <module>.lora_B   [out, rank]
    <module>.bias     whole biases, if bias= asked for them

MergedLinear splits its outputs into `len(enable_lora)` equal parts and has factors for the enabled
ones, one after the other: lora_A [enabled * rank, in], lora_B [enabled * part, rank]. Conv2d has
lora_A [rank * k, in * k] and lora_B [out * k, rank * k], whose product, read as [out, in, k, k], is
the update. Neither alpha nor enable_lora is in the file.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from lora_jax.adapters import Adapter
from lora_jax.errors import LoraError, naming
from lora_jax.exchange import tensor_file
from lora_jax.exchange.into_adapter import into_adapter
from lora_jax.exchange.module_update import Modules, ModuleUpdate, by_module, fuse
from lora_jax.exchange.names import NameTable
from lora_jax.models.hf_module import HfNames

Parts = dict[int, ModuleUpdate]  # the parts of a MergedLinear, by number


def load(
    state: str | os.PathLike[str] | Mapping[str, Any],
    names: HfNames | None,
    f: Callable[..., Any],
    params: Any,
    *args: Any,
    alpha: float,
    enable_lora: Mapping[str, Sequence[bool]] | None = None,
) -> Adapter:
    """Read the LoRA parameters of a model that was trained with loralib.

    Args:
      state: a safetensors file, or the arrays by name. A pickle, as written by torch.save, can run
        any code when it is read. If you trust it, convert it in PyTorch:
        `safetensors.torch.save_file(torch.load(file, weights_only=True), "lora.safetensors")`.
      names, f, params, *args: as for `lora_jax.exchange.peft.load`; they name the
        modules that loralib's layers replaced.
      alpha: the layers' `lora_alpha`.
      enable_lora: the setting of each MergedLinear, by a pattern of module names (`fnmatch`).

    Returns:
      The adapter. Each enabled part of a MergedLinear has factors of its own. Biases and other
      whole tensors are in `trainable`.

    Raises:
      LoraError: a damaged file, a name that loralib does not have, a MergedLinear that contradicts
        `enable_lora`, or a module that the model does not have.
    """
    place = pathlib.Path("the state" if isinstance(state, Mapping) else state)
    tensors = _read(place, state)
    with naming(place):
        table = NameTable.of(names, params)
        factors, values = _grouped(tensors)
        updates: dict[str, ModuleUpdate] = {}
        merged: dict[str, tuple[int, Parts]] = {}
        for module, (a, b) in factors.items():
            known = (enable_lora or {}).items()
            enabled = next((e for pattern, e in known if fnmatchcase(module, pattern)), None)
            window = _window(module, table)
            if enabled is not None:
                merged[module] = len(enabled), _parts(module, a, b, alpha, enabled)
            elif window is not None:
                updates[module] = _conv(module, a, b, alpha, window)
            else:
                _check(module, a, b, 1, " If it is a MergedLinear, name it in enable_lora.")
                updates[module] = ModuleUpdate(a, b, alpha)
        table, of_parts = _add_parts(table, merged)
        return into_adapter(Modules(updates | of_parts, values), table, f, params, args)


def _read(place: pathlib.Path, state: Any) -> dict[str, np.ndarray]:
    if isinstance(state, Mapping):
        found = {name: np.asarray(x) for name, x in state.items()}
        for name, x in found.items():
            tensor_file.check_finite(place, name, x)
    elif place.suffix in (".bin", ".pt", ".pth", ".pkl"):
        raise tensor_file.pickle_error(place, "lora.safetensors")
    else:
        found = tensor_file.read(place).tensors
    return {name: x.astype(np.float32) for name, x in found.items()}


def _grouped(
    tensors: Mapping[str, np.ndarray],
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
    """Return the pairs of factors by module, and the whole tensors by name."""
    sides = ("lora_A", "lora_B")
    factors = [name for name in tensors if name.rpartition(".")[2] in sides]
    keys = by_module(factors, sides)
    pairs = {m: (tensors[own["lora_A"]], tensors[own["lora_B"]]) for m, own in keys.items()}
    values = {name: x for name, x in tensors.items() if name not in set(factors)}
    for name in values:
        module, _, last = name.rpartition(".")
        if last != "bias" and (last != "weight" or module in pairs):
            raise LoraError(
                f"{name}: expected <module>.lora_A, .lora_B or .bias, as lora_state_dict(model) "
                "gives them. (A weight with factors may have the update added to it already.)"
            )
    return pairs, values


def _check(module: str, a: np.ndarray, b: np.ndarray, groups: int, cure: str = "") -> None:
    matrices = a.ndim == b.ndim == 2 and 0 not in (*a.shape, *b.shape)
    if not matrices or len(a) != groups * b.shape[1] or len(b) % groups:
        raise LoraError(
            f"{module!r} has lora_A {a.shape} and lora_B {b.shape}; expected [{groups} * rank, in] "
            f"and [{groups} * n, rank].{cure}"
        )


def _parts(module: str, a: Any, b: Any, alpha: float, enabled: Sequence[bool]) -> Parts:
    numbers = [i for i, on in enumerate(enabled) if on]
    _check(module, a, b, len(numbers) or 1, f" enable_lora is {tuple(enabled)}")
    pairs = zip(np.split(a, len(numbers)), np.split(b, len(numbers)), strict=True)
    return {i: ModuleUpdate(*pair, alpha) for i, pair in zip(numbers, pairs, strict=True)}


def _add_parts(
    table: NameTable, merged: Mapping[str, tuple[int, Parts]]
) -> tuple[NameTable, dict[str, ModuleUpdate]]:
    """Return a table in which parts of MergedLinears have names of their own, and their updates."""
    names: dict[str, Any] = {
        path: [dataclasses.replace(e, name=table.template(path, e)) for e in table.entries(path)]
        for path in table.paths()
    }
    updates: dict[str, ModuleUpdate] = {}
    for module, (count, parts) in merged.items():
        size = len(next(iter(parts.values())).b)
        for path, entry, *_ in table.find(f"{module}.weight"):
            matrix = len(table.shapes[path]) - table.holes(path, entry) == 2
            if entry.part is None and entry.rows is None and not entry.rotary and matrix:
                stem = table.template(path, entry).removesuffix(".weight")
                names[path] = [
                    dataclasses.replace(entry, name=f"{stem}.part{i}", part=(i * size, size))
                    for i in range(count)
                ]
                updates |= {f"{module}.part{i}": u for i, u in parts.items()}
                break
        else:
            pieces = [(np.arange(size) + i * size, u) for i, u in parts.items()]
            updates[module] = fuse(pieces, count * size)
    return NameTable(names, table.shapes), updates


def _window(module: str, table: NameTable) -> tuple[int, ...] | None:
    """Return the window of a convolution, or None for another module."""
    for path, entry, *_ in table.find(f"{module}.weight"):
        if entry.layer_of(path) == "conv":
            shape = table.shapes[path][table.holes(path, entry) :]
            return tuple(shape[:-2] if entry.is_transposed(path) else shape[2:])
    return None


def _conv(module: str, a: Any, b: Any, alpha: float, window: tuple[int, ...]) -> ModuleUpdate:
    """Return a convolution as one of rank `rank * k * k`: each row of the window has factors."""
    k = window[0]
    _check(module, a, b, 1)
    if window != (k, k) or len(a) % k or len(b) % k or a.shape[1] % k:
        raise LoraError(f"{module!r}: {a.shape} and {b.shape} are not a Conv2d of window {window}")
    rows = np.kron(np.eye(k, dtype=np.float32), a)
    scale = alpha * k / len(a)
    whole = rows.reshape(len(rows), -1, k, k)
    return ModuleUpdate(whole, b.reshape(len(b) // k, -1), scale * len(rows), layer="conv")
