"""GGUF adapter files for llama.cpp.

adapter = gguf.load("adapter.gguf", names, f, params, *args, base="model.gguf")
gguf.save("adapter.gguf", names, adapter, base="model.gguf")

The extra `gguf` installs the package that knows the format's types and tensor names.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from lora_jax.adapters import Adapter
from lora_jax.errors import LoraError, naming
from lora_jax.exchange import expert_stacks
from lora_jax.exchange.gguf_adapter_file import GgufAdapterFile
from lora_jax.exchange.gguf_base import HEAD, TABLE, File, GgufBase, known_base
from lora_jax.exchange.into_adapter import into_adapter
from lora_jax.exchange.module_update import Modules, ModuleUpdate, at_one_rank, check_plain
from lora_jax.exchange.names import NameTable
from lora_jax.exchange.out_of_adapter import out_of_adapter
from lora_jax.models.hf_module import HfNames
from lora_jax.system.whole_files import write_together


def load(
    file: File,
    names: HfNames | None,
    f: Callable[..., Any],
    params: Any,
    *args: Any,
    base: File | GgufBase | None = None,
) -> Adapter:
    """Read an adapter file.

    Args:
      file: of floats, or of any quantisation that the gguf package can expand.
      names, f, params, *args: as for `lora_jax.exchange.peft.load`.
      base: the GGUF file of the base, or a `GgufBase`. It is needed for q and k of "llama", whose
        rows are in another order that depends on the size of a head.

    Returns:
      The adapter, with its factors in float32.

    Raises:
      LoraError: a damaged file, metadata or a tensor that llama.cpp would not apply, or a tensor
        that the model does not have.
    """
    path = pathlib.Path(file)
    known = None if base is None else known_base(base)
    stored = GgufAdapterFile.read(path)
    with naming(path):
        known = known or known_base(GgufBase(stored.architecture))
        if known.architecture != stored.architecture:
            raise LoraError(
                f"the architecture is {stored.architecture!r}, of the base {known.architecture!r}"
            )
        table = NameTable.of(names, params)
        updates = {}
        for tensor, (a, b) in stored.factors.items():
            module = known.module(tensor, table)
            pieces = list(expert_stacks.unstack(module, a, b))
            known.check(tensor, a, b)
            for name, each_a, each_b in pieces:
                update = ModuleUpdate(each_a, each_b, stored.alpha or float(len(each_a)))
                order = known.order(tensor, len(each_b))
                updates[name] = update if order is None else update.of_rows(np.argsort(order))
        return into_adapter(Modules(updates), table, f, params, args)


def save(
    file: File,
    names: HfNames | None,
    adapter: Adapter,
    *,
    base: File | GgufBase,
    dtype: Literal["float32", "float16"] = "float32",
    params: Any = None,
    overwrite: bool = False,
) -> pathlib.Path:
    """Write an adapter as one file, for llama.cpp (`--lora`) and Ollama (`ADAPTER`).

    Args:
      file: the path to write, such as "adapter.gguf".
      names: as for `lora_jax.exchange.peft.save`; modules have Hugging Face's names.
      adapter: an `Adapter`, or a tuple of its first fields. Kinds other than LoRA are written as
        the LoRA that they are equal to. Ranks and scales that differ become one.
      base: the GGUF file of the base, to compare names and shapes with, or a `GgufBase`.
      dtype: of the factors.
      params: the base parameters, which some adapters need (see `peft.save`).
      overwrite: replace an existing file.

    Returns:
      The path of the file.

    Raises:
      LoraError: an adapter that llama.cpp cannot apply (DoRA, biases, whole tensors, convolutions,
        an embedding that is the output head too), or a module that its architecture does not have.
    """
    path, known = pathlib.Path(file), known_base(base)
    if path.exists() and not overwrite:
        raise LoraError(f"{path} exists; choose another name, or pass overwrite=True")
    _, modules = out_of_adapter(names, adapter, params)
    check_plain(modules, "a GGUF adapter", ("linear", "experts", "embedding"))
    updates = at_one_rank(modules.updates)
    factors = {}
    for module, (a, b) in expert_stacks.stack(updates).items():
        tensor = known.tensor(module)
        known.check(tensor, a, b)
        if updates.get(module, ModuleUpdate(a, b, 1)).layer == "embedding" and tensor != TABLE:
            raise LoraError(f"{module!r}: of embeddings, llama.cpp adapts {TABLE} only")
        if tensor in factors:
            raise LoraError(f"{module!r} and another module are both {tensor!r}; adapt one of them")
        order = known.order(tensor, b.shape[-2])
        factors[tensor] = a, b if order is None else b[..., order, :]
    untied = known.shapes is None or HEAD in known.shapes
    if TABLE in factors and (modules.ties or not untied):
        raise LoraError(
            f"{TABLE} is the output head too, and llama.cpp cannot adapt both by one pair of "
            "factors; merge the adapter, or leave the embedding out"
        )
    alpha = next(iter(updates.values())).alpha
    stored = GgufAdapterFile(known.architecture, alpha, factors).cast(dtype)
    write_together(path.parent, {path.name: stored.write})
    return path
