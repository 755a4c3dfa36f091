"""The base model of a GGUF adapter: its tensor names, its order of rows, its shapes."""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.errors import LoraError, listed, nearest
from lora_jax.exchange.axes import rotary_order
from lora_jax.exchange.expert_stacks import numbered
from lora_jax.exchange.names import NameTable
from lora_jax.system.extras import require

# Architecture -> whether its files hold the rows of q and k in the order of interleaved rotary
# pairs. The rows of all other weights are in Hugging Face's order. To add an architecture, look it
# up in llama.cpp's converter of models.
PERMUTED = {"llama": True} | dict.fromkeys(
    ("qwen2", "qwen2moe", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "phi3", "gpt2"), False
)
TABLE, HEAD = "token_embd.weight", "output.weight"
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
File = str | os.PathLike[str]


class GgufBase(NamedTuple):
    """The facts about the base model that its GGUF adapter needs.

    architecture: the value of general.architecture; "llama" for Mistral too.
    head_dim: the size of an attention head; needed for q and k of "llama".
    shapes: the shapes of its tensors, [out, in]. None: unknown, so nothing is compared with them.
    """

    architecture: str
    head_dim: int | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None

    def tensor(self, module: str) -> str:
        """Return the tensor for a Hugging Face module (or a stack of experts)."""
        known = _names(self.architecture)
        first = NUMBER.sub("0", module, count=1)
        if first not in known:
            raise LoraError(
                f"{module!r} is not a module of GGUF models of the architecture "
                f"{self.architecture!r}; nearest:\n{listed(nearest(first, known))}"
            )
        return f"{_of_block(known[first], module)}.weight"

    def module(self, tensor: str, table: NameTable) -> str:
        first = NUMBER.sub("0", tensor.removesuffix(".weight"), count=1)
        known = _names(self.architecture)
        aliases = [_of_block(m, tensor) for m, name in known.items() if name == first]
        found = [m for m in aliases if table.find(f"{numbered(m)}.weight")]
        if len(found) != 1:
            raise LoraError(
                f"{tensor!r} is {found or 'no module'} by the names given, which should have one "
                f"of:\n{listed(aliases, 40)}"
            )
        return found[0]

    def order(self, tensor: str, rows: int) -> np.ndarray | None:
        """Return, for each row of the tensor, the row of the module; None: the same order."""
        if not PERMUTED[self.architecture] or not re.search(r"attn_[qk]\.weight$", tensor):
            return None
        if not isinstance(self.head_dim, int) or self.head_dim < 1:
            raise LoraError(
                f"{tensor!r}: the order of its rows depends on the size of an attention head: pass "
                f"base=, the base's GGUF file, or GgufBase({self.architecture!r}, head_dim=64)"
            )
        try:
            return rotary_order(rows, self.head_dim)
        except LoraError as error:
            raise LoraError(f"{tensor!r}: {error}") from error

    def check(self, tensor: str, a: np.ndarray, b: np.ndarray) -> None:
        """Raise `LoraError` unless [rank, in] and [out, rank] fit the base's tensor."""
        if self.shapes is None:
            return
        shape = (*a.shape[:-2], b.shape[-2], a.shape[-1])
        wanted = self.shapes.get(tensor)
        if tensor == TABLE:
            shape = shape[::-1]  # the embedding is stored [vocabulary, width]
        if shape != wanted:
            raise LoraError(f"{tensor!r}: the factors are for {shape}, the base has {wanted}")


def known_base(base: File | GgufBase) -> GgufBase:
    """Return the facts about a GGUF model from its file, without reading weights."""
    if not isinstance(base, GgufBase):
        fields, tensors = read_header(pathlib.Path(base))
        kind = str(fields.get("general.architecture"))
        head_dim = fields.get(f"{kind}.attention.key_length")
        width = fields.get(f"{kind}.embedding_length")
        heads = fields.get(f"{kind}.attention.head_count")
        if head_dim is None and isinstance(width, int) and isinstance(heads, int) and heads:
            head_dim = width // heads
        base = GgufBase(kind, head_dim, {name: x.shape for name, x in tensors.items()})
    if base.architecture not in PERMUTED:
        raise LoraError(
            f"the architecture {base.architecture!r}: its order of rows is not known here, that of "
            f"{', '.join(sorted(PERMUTED))} is. Save as PEFT and use llama.cpp's own converter"
        )
    return base


def read_header(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata and the tensors of a GGUF file, by name."""
    require("gguf", "lora_jax.exchange.gguf")
    from lora_jax.errors import WeightsError
    from lora_jax.models.weights import gguf_header

    try:
        header = gguf_header.read(path)
    except WeightsError as error:
        raise LoraError(str(error)) from error
    return header.fields, header.tensors


@functools.cache
def _names(architecture: str) -> dict[str, str]:
    """Return {module: tensor} for the first block and for the tensors outside of blocks."""
    require("gguf", "lora_jax.exchange.gguf")
    import gguf

    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, 1).mapping
    return {module: tensor for module, (_, tensor) in names.items() if module != tensor}


def _of_block(name: str, other: str) -> str:
    """Return a name of the first block with the block number of another name."""
    number = NUMBER.search(other)
    return NUMBER.sub(number[0], name, count=1) if number else name
