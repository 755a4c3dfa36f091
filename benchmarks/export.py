"""Measure memory and time of `lora-jax export --format hf`, for a model larger than a shard.

    python -m benchmarks.export

The model is the decoder of 289 million parameters of `benchmarks.load`, random, in bfloat16, with
an adapter on every linear product. Each export runs in its own process. `peak` is the peak resident
memory (VmHWM) above the memory before the export, `bound` is 1.3 times one shard. The files are in
the page cache, so the seconds do not depend on a disk.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from benchmarks.common import hardware, table
from benchmarks.load import peak, write
from lora_jax import models
from lora_jax.cli import export

# (shard in 10^9 bytes, dtype that is written, layers)
CASES = [
    (shard, dtype, layers)
    for shard in (0.5, 1.0)
    for dtype in ("bfloat16", "float32")
    for layers in ("unrolled", "scanned")
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", nargs=3, help="measure one export and print it as JSON")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.one is not None:
        print(json.dumps(_measure(asked.folder, *asked.one)))
        return
    print(hardware(), "\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for shard, dtype, layers in CASES:
            one = ("--one", str(shard), dtype, layers, "--folder", folder)
            command = [sys.executable, "-m", "benchmarks.export", *one]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            megabytes = (found["written"], found["largest"], found["peak"], 1.3e9 * shard)
            numbers = [f"{value / 1e6:,.0f} MB" for value in megabytes]
            rows.append([f"{shard} GB", dtype, layers, *numbers, f"{found['seconds']:.1f}"])
    header = ["shard", "written as", "layers", "in all", "largest tensor", "peak", "bound"]
    print(table([*header, "seconds"], rows))


def _measure(folder: Path, shard: str, dtype: str, layers: str) -> dict[str, float]:
    jax.config.update("jax_platforms", "cpu")
    run, out = folder / f"run-{layers}", folder / "out"
    if not run.exists():
        _write_run(run, write(folder, "bfloat16", False), layers == "scanned")
    before, start = peak(reset=True), time.perf_counter()
    options = ("--format", "hf", "--dtype", dtype, "--shard-gb", shard)
    status = export.main([str(run), "--out", str(out), *options])
    seconds, most = time.perf_counter() - start, peak() - before
    assert status == 0
    files = list(out.iterdir())
    written = sum(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    out.rmdir()
    largest = 32000 * 1024 * jnp.dtype(dtype).itemsize
    return {"written": written, "largest": largest, "peak": most, "seconds": seconds}


def _write_run(run: Path, base: Path, scan: bool) -> None:
    """Write an adapter of rank 8 on every product, in a separate process, as it loads the base."""
    code = (
        f"import pathlib, benchmarks.export as e; e.written(pathlib.Path({str(run)!r}), "
        f"pathlib.Path({str(base)!r}), {scan})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def written(run: Path, base: Path, scan: bool) -> None:
    """Write the adapter of `_write_run`."""
    source = models.open(str(base))
    assert isinstance(source.config, models.DecoderConfig)
    config = dataclasses.replace(source.config, scan_layers=scan, param_dtype=jnp.bfloat16)
    model = models.DecoderModel(config)

    def f(params: Any, ids: Any) -> Any:
        return model.apply({"params": params}, ids)

    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    layout = lora_jax.resolve(lora_jax.LoraSpec(8, 16.0), f, models.shapes(config), ids)
    adapters = lora_jax.init(jax.random.key(0), layout)
    fingerprint = lora_jax.fingerprint(source.load(config))
    about = {"reference": str(base), "scan_layers": scan, "param_dtype": "bfloat16"}
    adapter = lora_jax.Adapter(layout, adapters)
    lora_jax.save(run, adapter, fingerprint=fingerprint, about={"model": about})


if __name__ == "__main__":
    main()
