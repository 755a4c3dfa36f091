"""The contents of a GGUF adapter file, in the form that llama.cpp accepts.

The metadata are general.type "adapter", the base's general.architecture, adapter.type "lora", and
adapter.lora.alpha. Each adapted weight has two tensors (axes in NumPy's order, the reverse of
ggml's):

    <tensor>.lora_a   [rank, in]; of experts [experts, rank, in]; of token_embd [vocabulary, rank]
    <tensor>.lora_b   [out, rank]; of experts [experts, out, rank]

The scale is alpha / rank, with the rank of each tensor. It is 1 if alpha is 0 or missing.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.errors import LoraError, naming
from lora_jax.exchange.gguf_base import TABLE, read_header
from lora_jax.exchange.module_update import by_module

KIND, ARCHITECTURE = "general.type", "general.architecture"
TYPE, ALPHA = "adapter.type", "adapter.lora.alpha"
INVOCATION = "adapter.alora.invocation_tokens"


class GgufAdapterFile(NamedTuple):
    """The contents of a GGUF adapter file.

    architecture, alpha: from the metadata.
    factors: (a [rank, in], b [out, rank]) for each adapted tensor of the base, by its name.
    """

    architecture: str
    alpha: float
    factors: Mapping[str, tuple[np.ndarray, np.ndarray]]

    @classmethod
    def read(cls, path: pathlib.Path) -> GgufAdapterFile:
        """Read a file of floats, or of any quantisation that the gguf package can expand."""
        fields, tensors = read_header(path)
        with naming(path):
            alpha = _alpha(fields)
            factors = {}
            for tensor, keys in by_module(tensors, ("lora_a", "lora_b")).items():
                a, b = (_numbers(tensors[keys[side]]) for side in ("lora_a", "lora_b"))
                factors[tensor] = (a.T if tensor == TABLE else a), b
        return cls(fields[ARCHITECTURE], alpha, factors)

    def cast(self, dtype: str) -> GgufAdapterFile:
        """Return the same file with factors of another dtype."""
        if dtype not in ("float32", "float16"):
            raise LoraError(f"dtype is {dtype!r}; factors are written as 'float32' or 'float16'")
        factors = {}
        for tensor, pair in self.factors.items():
            with np.errstate(over="ignore"):
                a, b = (x.astype(dtype) for x in pair)
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise LoraError(f"{tensor}: a factor has numbers that {dtype} cannot hold")
            factors[tensor] = a, b
        return self._replace(factors=factors)

    def write(self, path: pathlib.Path) -> None:
        import gguf

        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_string(KIND, "adapter")
        writer.add_string(TYPE, "lora")
        writer.add_float32(ALPHA, self.alpha)
        for tensor, (a, b) in self.factors.items():
            stored = a.T if tensor == TABLE else a
            for name, array in (("lora_a", stored), ("lora_b", b)):
                writer.add_tensor(f"{tensor}.{name}", np.ascontiguousarray(array).view(_Written))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


class _Written(np.ndarray):
    """An array for gguf, which calls `tofile`: NumPy's own says nothing of a full disk."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        fid.write(self.data)


def _alpha(fields: Mapping[str, Any]) -> float:
    """Return alpha, after checking that llama.cpp would accept the metadata."""
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
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise LoraError(f"{ALPHA} is {alpha!r}, expected a finite float")
    return alpha


def _numbers(tensor: Any) -> np.ndarray:
    from lora_jax.errors import WeightsError

    try:
        x = tensor.read(tuple(slice(0, n) for n in tensor.shape))
    except WeightsError as error:
        raise LoraError(str(error)) from error
    if not np.isfinite(x).all():
        raise LoraError(f"{tensor.name} holds numbers that are not finite (NaN or infinity)")
    return np.asarray(x, np.float32)
