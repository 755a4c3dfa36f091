"""GGUF adapter files, as llama.cpp reads them.

adapter = gguf.load("adapter.gguf", names, f, params, *args, base="model.gguf")
gguf.save("adapter.gguf", names, adapter, base="model.gguf")

Metadata: general.type "adapter", general.architecture as the base has it, adapter.type "lora",
adapter.lora.alpha. For each adapted weight two tensors (axes in NumPy's order, the reverse of
ggml's):

    <tensor>.lora_a   [rank, in]; of experts [experts, rank, in]; of token_embd [vocabulary, rank]
    <tensor>.lora_b   [out, rank]; of experts [experts, out, rank]

The scale is alpha / rank, with the rank of each tensor; 1 where alpha is 0 or not there.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from lora_jax import paths
from lora_jax.adapters import Adapter
from lora_jax.errors import LoraError
from lora_jax.exchange import expert_stacks
from lora_jax.exchange.files import naming, write_together
from lora_jax.exchange.gguf_base import HEAD, TABLE, File, GgufBase, known_base, read_header
from lora_jax.exchange.into_adapter import into_adapter
from lora_jax.exchange.module_update import Modules, ModuleUpdate, at_one_rank, check_plain
from lora_jax.exchange.names import NameTable
from lora_jax.exchange.out_of_adapter import name_table, out_of_adapter
from lora_jax.hf_module import Names

KIND, ARCHITECTURE = "general.type", "general.architecture"
TYPE, ALPHA = "adapter.type", "adapter.lora.alpha"
INVOCATION = "adapter.alora.invocation_tokens"


def load(
    file: File,
    names: Names | None,
    f: Callable[..., Any],
    params: Any,
    *args: Any,
    base: File | GgufBase | None = None,
) -> Adapter:
    """Read an adapter file.

    Args:
      file: of floats, or of any quantisation that the gguf package can expand.
      names, f, params, *args: as for `lora_jax.exchange.peft.load`.
      base: the GGUF file of the base, or `GgufBase`. Needed for q and k of "llama", whose rows
        are in another order: the size of a head says which.

    Raises:
      LoraError: a damaged file, metadata or a tensor that llama.cpp would not apply, a tensor that
        the model does not have.
    """
    path = pathlib.Path(file)
    fields, tensors = read_header(path)
    known = None if base is None else known_base(base)
    with naming(path):
        alpha = _alpha(fields)
        own = known_base(GgufBase(fields[ARCHITECTURE]))
        known = known or own
        if known.architecture != own.architecture:
            raise LoraError(
                f"{ARCHITECTURE} is {own.architecture!r}, and of the base {known.architecture!r}"
            )
        shapes = {p: tuple(x.shape) for p, x in paths.flatten(params).items()}
        table = NameTable(names, shapes)
        updates = {}
        for tensor, a, b in _pairs(tensors):
            module = known.module(tensor, table)
            pieces = list(expert_stacks.unstack(module, a, b))
            known.check(tensor, a, b)
            for name, each_a, each_b in pieces:
                update = ModuleUpdate(each_a, each_b, alpha or float(len(each_a)))
                order = known.order(tensor, len(each_b))
                updates[name] = update if order is None else update.of_rows(np.argsort(order))
        return into_adapter(Modules(updates), table, f, params, args)


def save(
    file: File,
    names: Names | None,
    adapter: Adapter,
    *,
    base: File | GgufBase,
    dtype: Literal["float32", "float16"] = "float32",
    params: Any = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Write an adapter as one file, for llama.cpp (`--lora`) and Ollama (`ADAPTER`).

    Args:
      file: where, "adapter.gguf".
      names: as for `lora_jax.exchange.peft.save`; modules are named as Hugging Face does.
      adapter: an `Adapter`, or a tuple of its first fields. Other kinds than LoRA are written as
        the LoRA that they are; ranks and scales that differ become one.
      base: the GGUF file of the base, with which names and shapes are compared, or `GgufBase`.
      dtype: of the factors.
      params: the base parameters, which some adapters need (see `peft.save`).
      overwrite: replace the file.

    Returns:
      The path of the file.

    Raises:
      LoraError: an adapter that llama.cpp cannot apply (DoRA, biases, whole tensors, convolutions,
        an embedding that is the output head too), or a module that its architecture does not have.
    """
    path, known = pathlib.Path(file), known_base(base)
    if path.exists() and not overwrite:
        raise LoraError(f"{path} exists; choose another name, or pass overwrite=True")
    adapter = Adapter(*adapter)
    modules = out_of_adapter(adapter, name_table(names, adapter, params), params)
    check_plain(modules, "a GGUF adapter", ("linear", "experts", "embedding"))
    updates = at_one_rank(modules.updates)
    tensors = {}
    for module, (a, b) in expert_stacks.stack(updates).items():
        tensor = known.tensor(module)
        known.check(tensor, a, b)
        if updates.get(module, ModuleUpdate(a, b, 1)).layer == "embedding" and tensor != TABLE:
            raise LoraError(f"{module!r}: of embeddings, llama.cpp adapts {TABLE} only")
        order = known.order(tensor, b.shape[-2])
        tensors[f"{tensor}.lora_a"] = _cast(tensor, a.T if tensor == TABLE else a, dtype)
        tensors[f"{tensor}.lora_b"] = _cast(tensor, b if order is None else b[..., order, :], dtype)
    untied = known.shapes is None or HEAD in known.shapes
    if f"{TABLE}.lora_a" in tensors and (modules.ties or not untied):
        raise LoraError(
            f"{TABLE} is the output head too, and llama.cpp cannot adapt both by one pair of "
            "factors; merge the adapter, or leave the embedding out"
        )
    alpha = next(iter(updates.values())).alpha
    write = functools.partial(_write, known.architecture, alpha, tensors)
    write_together(path.parent, {path.name: write})
    return path


def _alpha(fields: Mapping[str, Any]) -> float:
    """Alpha, of metadata that llama.cpp would accept."""
    for key, wanted in ((KIND, "adapter"), (TYPE, "lora")):
        if fields.get(key) != wanted:
            raise LoraError(f"{key} is {fields.get(key)!r}, expected {wanted!r}")
    if not isinstance(fields.get(ARCHITECTURE), str):
        raise LoraError(f"{ARCHITECTURE} is {fields.get(ARCHITECTURE)!r}, expected a name")
    if INVOCATION in fields:
        raise LoraError(
            f"{INVOCATION}: an adapter that is switched on by tokens (aLoRA) is not supported"
        )
    alpha = fields.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha) or alpha < 0:
        raise LoraError(f"{ALPHA} is {alpha!r}, expected a number that is not negative")
    return alpha


def _pairs(tensors: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (tensor, a [rank, in], b [out, rank]) of the file."""
    for key in tensors:
        tensor, _, side = key.rpartition(".")
        if side not in ("lora_a", "lora_b"):
            raise LoraError(
                f"{key}: not the name of a factor, and llama.cpp does not apply it; expected "
                "<tensor>.lora_a or .lora_b"
            )
        other = f"{tensor}.lora_{'b' if side == 'lora_a' else 'a'}"
        if other not in tensors:
            raise LoraError(f"{key} is there, and {other} is not")
    for key in tensors:
        if tensor := key.removesuffix(".lora_a") * key.endswith(".lora_a"):
            a, b = _numbers(tensors[key]), _numbers(tensors[f"{tensor}.lora_b"])
            yield tensor, a.T if tensor == TABLE else a, b


def _numbers(tensor: Any) -> np.ndarray:
    from lora_jax.models.errors import WeightsError

    try:
        x = tensor.read(tuple(slice(0, n) for n in tensor.shape))
    except WeightsError as error:
        raise LoraError(str(error)) from error
    if not np.isfinite(x).all():
        raise LoraError(f"{tensor.name} holds numbers that are not finite (NaN or infinity)")
    return np.asarray(x, np.float32)


def _cast(tensor: str, x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype not in ("float32", "float16"):
        raise LoraError(f"dtype is {dtype!r}; factors are written as 'float32' or 'float16'")
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(x.astype(dtype))
    if not np.isfinite(cast).all():
        raise LoraError(f"{tensor}: numbers that {dtype} cannot hold, or that are not finite")
    return cast


def _write(
    architecture: str, alpha: float, tensors: Mapping[str, np.ndarray], path: pathlib.Path
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(KIND, "adapter")
    writer.add_string(TYPE, "lora")
    writer.add_float32(ALPHA, alpha)
    for name, x in tensors.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
