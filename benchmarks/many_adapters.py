"""Time `lora-jax predict` with hundreds of adapters of one base.

    python -m benchmarks.many_adapters

Adapters of the default run's kind (all-MiniLM-L6-v2, LoRA r=8 on q and v, a head of two classes)
with random numbers are saved by `lora_jax.save`. The command opens them all and classifies short
texts, each with the next adapter. Each repeat is a new process. The table has medians: seconds, and
CPU seconds (user and system, all threads), since other work may share the machine.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks import commands, common
from lora_jax import models, paths

TARGETS = ("bert/encoder/layer*/attention/{query,value}/kernel",)
ABOUT = {
    "labels": ["no", "yes"],
    "text_fields": ["text"],
    "lengths": [24, 32, 48, 64],
    "model": {"reference": models.MINILM, "pooling": "mean", "scan_layers": False}
    | {"dtype": "float32", "param_dtype": "float32"},
}


def make(folder: pathlib.Path, count: int) -> None:
    """Save `count` adapters."""
    source = models.open(models.MINILM)
    assert isinstance(source.config, models.BertConfig)
    model = models.BertClassifier(source.config, 2, "mean")
    ids = jnp.ones((1, 8), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    spec = lora_jax.LoraSpec(8, 16.0, targets=TARGETS)
    layout = lora_jax.resolve(spec, lambda p, ids: model.apply({"params": p}, ids), shapes, ids)
    frozen = lora_jax.fingerprint({"bert": source.load()})
    like = jax.eval_shape(lambda: lora_jax.init(jax.random.key(0), layout))
    head = {p: x for p, x in paths.flatten(shapes).items() if p.startswith("classifier/")}
    for number in range(count):
        place = folder / f"adapter_{number:04d}"
        if not place.exists():
            draw = functools.partial(_normal, np.random.default_rng(number))
            factors, trained = jax.tree.map(draw, (like, head))
            adapter = lora_jax.Adapter(layout, factors, trained)
            lora_jax.save(place, adapter, fingerprint=frozen, about=ABOUT)


def _normal(random: np.random.Generator, like: Any) -> Any:
    return random.normal(0, 0.02, like.shape).astype(np.float32)


def write_lines(file: pathlib.Path, lines: int, count: int) -> None:
    """Write short texts, each for one of the adapters in turns."""
    text = "the film is warm funny sad long and a story of two people in love"
    words = text.split()
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(words, random.integers(5, 20))) for _ in range(lines)]
    rows = [{"text": t, "adapter": f"adapter_{i % count:04d}"} for i, t in enumerate(texts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds to open many adapters and predict.")
    parser.add_argument("--adapters", type=int, default=500)
    parser.add_argument("--lines", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        make(folder / "runs", asked.adapters)
        for lines in (1, asked.lines):
            write_lines(folder / "in.jsonl", lines, asked.adapters)
            command = [sys.executable, "-m", "lora_jax", "predict", "--adapter", f"{folder}/runs"]
            command += ["--file", f"{folder}/in.jsonl", "--out", f"{folder}/out.jsonl"]
            taken = [commands.spent(command, {}) for _ in range(asked.repeats)]
            seconds = statistics.median(x.seconds for x in taken)
            processor = statistics.median(x.processor for x in taken)
            rows.append((f"{asked.adapters:,}", f"{lines:,}", f"{seconds:.1f}", f"{processor:.1f}"))
    print(f"{common.hardware()}; {commands.load()}", end="\n\n")
    print(common.table(("adapters", "texts", "s", "CPU s"), rows))


if __name__ == "__main__":
    main()
