"""Measure host memory while weights are loaded from several kinds of files to their shards.

    python -m benchmarks.load

A decoder of 289 million parameters with random weights is written once for each kind of file. Each
load runs in its own process with eight simulated devices. `on the host` is the memory of all shards
together, `peak` the peak resident memory (VmHWM) above that of imports and the backend, `bound` 1.3
times the first plus 500 MB. The files are in the page cache, so the seconds do not depend on a
disk.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from benchmarks.common import hardware, table
from lora_jax import models, paths, sharding
from lora_jax.models.placement import rules
from lora_jax.models.weights import families
from lora_jax.system import host_memory

# dtype or kind of the file - dtype of the parameters
FORMS = ["float32-float32", "float32-bfloat16", "bfloat16-bfloat16", "Q8_0-bfloat16"]
MESHES = [(1, 8, 1), (1, 1, 8)]
_SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16}
_TINY = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", choices=FORMS, help="measure one load and print it as JSON")
    parser.add_argument("--mesh", type=int, nargs=3, default=MESHES[0])
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a sixth of the size")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.one is not None:
        print(json.dumps(_measure(asked)))
        return
    print(hardware(), "\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for form in FORMS:
            for mesh in MESHES:
                for scan in ([], ["--scan"]):
                    rows.append(
                        _row(_run(form, mesh, [*scan, "--folder", folder]), form, mesh, scan)
                    )
    header = ["file - parameters", "mesh", "layers", "on the host", "peak", "bound", "seconds"]
    print(table(header, rows))


def _run(form: str, mesh: tuple[int, ...], more: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.load", "--one", form, *more]
    command += ["--mesh", *map(str, mesh)]
    # This measures the memory of loading without memory that the allocator would keep.
    environment = {**os.environ, host_memory.VARIABLE: "0"}
    done = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(found: dict[str, Any], form: str, mesh: tuple[int, ...], scan: list[str]) -> list[str]:
    bound = 1.3 * found["landed"] + 500e6
    megabytes = [f"{value / 1e6:,.0f} MB" for value in (found["landed"], found["peak"], bound)]
    layers = "scanned" if scan else "unrolled"
    return [form, str(mesh), layers, *megabytes, f"{found['seconds']:.2f}"]


# ---- one process -----------------------------------------------------------------------------


def _measure(asked: argparse.Namespace) -> dict[str, float]:
    """Return the bytes on all devices, the peak above those before, and the seconds of a load."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    stored, dtype = asked.one.split("-")
    source = models.open(str(write(asked.folder, stored, asked.tiny)))
    config = dataclasses.replace(
        source.config, scan_layers=asked.scan, param_dtype=jnp.dtype(dtype).type
    )
    shapes = models.shapes(config)
    shardings = _shardings(config, shapes, tuple(asked.mesh))
    before = peak(reset=True)
    start = time.perf_counter()
    params = jax.block_until_ready(source.load(config, shardings=shardings))
    seconds = time.perf_counter() - start
    most = peak() - before
    shards = [one for leaf in jax.tree.leaves(params) for one in leaf.addressable_shards]
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    landed = sum(one.data.nbytes for one in shards)
    return {"landed": landed, "expected": expected, "peak": most, "seconds": seconds}


def peak(reset: bool = False) -> int:
    """Return the peak resident memory of this process so far, or since the last reset, in bytes.

    `ru_maxrss` would not do, because a process inherits it from its parent.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def _shardings(config: Any, shapes: Any, sizes: tuple[int, ...]) -> Any:
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    specs = sharding.specs(rules(config), shapes)
    leaves, tree = jax.tree.flatten(shapes)
    in_order = (specs[path] for path in paths.flatten(jax.tree.unflatten(tree, leaves)))
    return jax.tree.unflatten(tree, [NamedSharding(mesh, spec) for spec in in_order])


# ---- the files -------------------------------------------------------------------------------


def write(folder: Path, stored: str, tiny: bool) -> Path:
    """Return the model file of that dtype or kind, which is written if it does not exist yet."""
    json_: dict[str, Any] = {"model_type": "llama", "vocab_size": 32000, "num_attention_heads": 16}
    json_ |= {"num_key_value_heads": 8, "max_position_embeddings": 2048}
    json_ |= {"tie_word_embeddings": True, **(_TINY if tiny else _SIZES)}
    path = folder / ("Q8_0.gguf" if stored == "Q8_0" else stored)
    if not path.exists():
        if stored == "Q8_0":
            _write_gguf(path, json_)
        else:
            _write_folder(path, json_, stored)
    return path


def _write_folder(path: Path, json_: dict[str, Any], stored: str) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(json_))
    shapes = _tensors(json_)
    numbers = _numbers(shapes).astype(stored)
    header, end = {}, 0
    for name, shape in shapes.items():
        place = [end, end := end + math.prod(shape) * numbers.itemsize]
        dtype = {"float32": "F32", "bfloat16": "BF16"}[stored]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": place}
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            numbers[: math.prod(shape)].tofile(file)


def _write_gguf(path: Path, json_: dict[str, Any]) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(json_["num_hidden_layers"])
    writer.add_context_length(json_["max_position_embeddings"])
    writer.add_embedding_length(json_["hidden_size"])
    writer.add_feed_forward_length(json_["intermediate_size"])
    writer.add_head_count(json_["num_attention_heads"])
    writer.add_head_count_kv(json_["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    table_ = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, json_["num_hidden_layers"])
    shapes = _tensors(json_)
    numbers = _numbers(shapes)
    blocks = gguf.quants.quantize(numbers.reshape(-1, 32), kind)
    for name, shape in shapes.items():
        stored, count = table_.get_name(name, (".weight",)), math.prod(shape)
        assert stored is not None
        if len(shape) == 1:
            writer.add_tensor(stored, numbers[:count])
        else:
            rows = blocks[: count // 32].reshape(shape[0], -1)
            writer.add_tensor(stored, rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(json_: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return Hugging Face's name of each tensor, and its stored shape."""
    config = families.parse(json_, "")
    shapes, found = paths.flatten(models.shapes(config)), {}
    for row in families.FAMILIES["llama"].names.rows:
        for layer in range(config.num_layers if row.layered else 1):
            leaf = shapes.get(row.path.format(layer=layer))
            if leaf is not None:
                kernel = row.transposed
                shape = leaf.shape[::-1] if kernel else leaf.shape
                found[row.hf.format(layer=layer)] = shape
    return found


def _numbers(shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
    """Return random numbers for the largest tensor; the others use the first of them."""
    tile = np.random.default_rng(0).standard_normal(2**20, np.float32)
    return np.resize(tile, max(map(math.prod, shapes.values())))


if __name__ == "__main__":
    main()
