"""A GGUF file with the fields of a Llama, to which a test adds tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf

FIELDS = {"block_count": 2, "context_length": 32, "embedding_length": 16}
FIELDS |= {"feed_forward_length": 20, "attention.head_count": 4}


@contextlib.contextmanager
def written(path: Path, arch: str = "llama", eps: float = 1e-5, **fields: Any) -> Iterator[Any]:
    """Yield a writer for tensors; `fields` replace FIELDS, without the architecture."""
    writer = gguf.GGUFWriter(str(path), arch)
    for name, value in (FIELDS | fields).items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{arch}.{name}", value)
    writer.add_layer_norm_rms_eps(eps)
    yield writer
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_config(hf: dict[str, Any]) -> dict[str, int]:
    """Return the fields of a `config.json`."""
    return {
        "block_count": hf["num_hidden_layers"],
        "context_length": hf["max_position_embeddings"],
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
    }
