"""A model's weights in safetensors files of bounded size, with the index that names them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

from lora_jax.exchange.tensor_file import LazyTensor, write_lazily
from lora_jax.system.whole_files import FileWriter

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def writers(
    tensors: Sequence[LazyTensor],
    shard_bytes: float,
    done: Callable[[int], None] = lambda size: None,
) -> dict[str, FileWriter]:
    """Return {file name: writer} for the weights, for `whole_files.write_together`.

    Small weights go to one file `model.safetensors`; otherwise there are numbered files of up to
    `shard_bytes` (a larger array has its own) and an index, as transformers writes them. Each array
    is made when it is written, and none is kept. `done` gets the bytes of each after that.
    """
    shards: list[list[LazyTensor]] = [[]]
    for x in tensors:
        if shards[-1] and sum(y.nbytes for y in shards[-1]) + x.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(x)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    found: dict[str, FileWriter] = {
        name: functools.partial(write_lazily, tensors=shard, metadata={"format": "pt"}, done=done)
        for name, shard in zip(names, shards, strict=True)
    }
    if len(shards) > 1:
        files = {x.name: name for name, shard in zip(names, shards, strict=True) for x in shard}
        total = {"total_size": sum(x.nbytes for x in tensors)}
        text = json.dumps({"metadata": total, "weight_map": files}, indent=2) + "\n"
        found[INDEX] = lambda path: path.write_text(text)
    return found
