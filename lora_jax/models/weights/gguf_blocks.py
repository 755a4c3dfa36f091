"""Keep tensors of a GGUF file in their quantised blocks."""

from typing import Any

import numpy as np

from lora_jax.bases.ggml import FORMATS, GgmlBlocks
from lora_jax.errors import WeightsError
from lora_jax.models.weights.gguf_header import Quantised
from lora_jax.models.weights.kept import ArrayOnDisk
from lora_jax.models.weights.shards import Index

_FLOATS = ("F64", "F32", "F16", "BF16")


def base(
    tensor: Quantised, order: np.ndarray, transposed: bool, dtype: np.dtype
) -> GgmlBlocks | None:
    """Return the base of a matrix in blocks, with arrays on disk; None for floats.

    `order` has, for each row of the result, the row of the file: blocks run along a row, so rows
    can change places without touching a block.
    """
    kind = tensor.kind.name
    if kind in _FLOATS:
        return None
    if kind not in FORMATS or len(tensor.shape) != 2:
        raise WeightsError(
            f"{tensor.path}: tensor {tensor.name} of shape {tensor.shape} is quantised as {kind}; "
            f"matrices in {', '.join(FORMATS)} can be held as they are. keep_quantised=False "
            "expands the others to floats."
        )
    record = FORMATS[kind].record
    axes = (1, 0) if transposed else (0, 1)
    fields: dict[str, Any] = {
        name: _field(tensor, record, name, order) for name in record.names or ()
    }
    return GgmlBlocks(tensor.shape, axes, np.dtype(dtype).name, fields, kind)


def _field(tensor: Quantised, record: np.dtype, name: str, order: np.ndarray) -> ArrayOnDisk:
    def read(index: Index) -> np.ndarray:
        # The file is mapped for each call; see `Quantised.read`.
        rows = order[index[0]]
        return np.asarray(tensor.blocks(record)[name][rows][(slice(None), *index[1:])])

    dtype, shape = record[name].base, record[name].shape
    blocks = tensor.shape[1] // FORMATS[tensor.kind.name].size
    return ArrayOnDisk((tensor.shape[0], blocks, *shape), dtype, read)
