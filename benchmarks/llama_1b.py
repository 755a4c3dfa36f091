"""Compare one LoRA step of a decoder shaped like Llama 3.2 1B in bfloat16 with its plan.

    python -m benchmarks.llama_1b                      on the accelerators of this machine
    python train.py --config benchmarks/llama_1b.py --plan --plan-devices 1

The step has r=8 on q and v, random weights, 8 rows of 2,048 tokens, scanned and rematerialised
layers, and the loss in chunks of 256 positions. The benchmark prints tokens/s, the device's own
count of its memory, and the model-FLOPs utilisation: the FLOPs that a step without
rematerialisation needs, divided by the time and by the device's peak. The plan runs in another
process, on simulated devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks import common
from lora_jax import models
from lora_jax.data.process_slice import Shard
from lora_jax.models import placement
from lora_jax.system.devices import DEVICES, KINDS
from lora_jax.training import mesh, optimizer, step
from lora_jax.training.causal_lm import apply_of, batch_shapes, token_loss
from lora_jax.training.config import Config, LoraConfig
from lora_jax.training.workload import Batch, Workload

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig(Config):
    """The shape of the model and of the batch."""

    layers: int = 16
    """Decoder layers."""
    hidden: int = 2048
    """Width; heads are 64 wide, and there are a fourth as many for keys and values."""
    vocabulary: int = 128_256
    """Size of the vocabulary."""
    rows: int = 8
    """Rows of a batch."""
    length: int = 2048
    """Tokens of a row."""
    loss_chunk: int = 256
    """Positions of a row whose logits exist at the same time."""

    @property
    def model(self) -> models.DecoderConfig:
        """The config of Llama 3.2 1B at these sizes."""
        heads = self.hidden // 64
        return models.DecoderConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=heads,
            num_kv_heads=max(heads // 4, 1),
            head_dim=64,
            mlp_size=4 * self.hidden,
            max_positions=self.length,
            rope_theta=500_000.0,
            tied=True,
            scan_layers=True,
            remat="full",
            dtype=jnp.dtype("bfloat16"),
            param_dtype=jnp.dtype("bfloat16"),
        )


class RandomTokens:
    """An iterator of random tokens; batch i depends only on i."""

    def __init__(self, config: StepConfig, shard: Shard) -> None:
        self.config, self.shard, self.position = config, shard, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        shape = (self.config.rows, self.config.length)
        random = np.random.default_rng(self.position)
        self.position += 1
        ids = random.integers(0, self.config.vocabulary, shape, np.int32)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        batch = {
            "input_ids": ids,
            "targets": np.roll(ids, -1, axis=1),
            "loss_weight": np.ones(shape, np.float32),
            "segment_ids": np.ones(shape, np.int32),
            "positions": positions,
        }
        return self.shard.take(batch)

    def get_state(self) -> dict[str, Any]:
        """Return the number of the next batch."""
        return {"position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at that batch."""
        self.position = state["position"]


def workload(config: StepConfig) -> Workload:
    """Return the workload, whose random weights are drawn with their shardings."""
    shapes = models.shapes(config.model)

    def load(shardings: Any) -> Any:
        leaves, tree = jax.tree.flatten(shapes)

        def draw(key: jax.Array) -> Any:
            keys = jax.random.split(key, len(leaves))
            drawn = [
                jax.random.normal(k, x.shape, x.dtype) * x.dtype.type(0.02)
                for k, x in zip(keys, leaves, strict=True)
            ]
            return jax.tree.unflatten(tree, drawn)

        return jax.jit(draw, out_shardings=shardings)(jax.random.key(0))

    return Workload(
        apply=apply_of(models.DecoderModel(config.model), config.loss_chunk),
        loss=token_loss,
        params=shapes,
        load=load,
        placement=placement.rules(config.model),
        example=batch_shapes(config.rows, config.length),
        train=lambda shard: RandomTokens(config, shard),
        size=lambda batch: int(batch["loss_weight"].sum()),
        unit="tokens",
    )


config = StepConfig(
    workload=workload, steps=20, lora=LoraConfig(rank=8, targets=("layers/attention/{q,v}/kernel",))
)


def model_flops(config: StepConfig) -> float:
    """Return the FLOPs of one step without rematerialisation.

    The forward pass, and the backward pass to the activations, take 2 FLOPs for each parameter and
    token (only the factors have a gradient). Attention takes 4 T D for each token and layer, of
    which half is masked.
    """
    tokens = config.rows * config.length
    products = sum(x.size for x in jax.tree.leaves(models.shapes(config.model)) if x.ndim > 1)
    attention = 2 * config.length * config.hidden * config.layers
    # The backward pass of attention has twice the products of the forward pass.
    return tokens * (4.0 * products + 3 * attention)


def measure(config: StepConfig, repeats: int) -> dict[str, float]:
    """Return the median seconds of a step, and the device's peak memory."""
    grid = mesh.make(config.mesh)
    made = workload(config)
    with jax.set_mesh(grid):
        data = made.train(mesh.shard_of(grid))
        place = mesh.place(made, config.mesh, grid, made.example)
        params, key = made.arrays(place.params), jax.random.key(0)
        layout = lora_jax.resolve(
            config.lora.spec, made.apply, params, made.example, train=True, key=key
        )
        tx = optimizer.adamw(optimizer.hyper(config.optimizer, config.steps))
        state = step.create(layout, {}, tx, key, place)
        take = jax.jit(
            step.train_step(made, layout, tx, "stop", config.accumulate),
            **step.compilation(state, place),
        )
        batch = place.batch(next(data))

        def once() -> Any:
            nonlocal state
            state, values = take(state, params, batch)
            return values

        seconds = common.interleaved({"step": once}, repeats)["step"]
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"seconds": seconds, "peak": float(stats.get("peak_bytes_in_use", 0))}


def plan(arguments: list[str], device: str, devices: int) -> dict[str, Any]:
    """Return the plan of the same step as JSON, made in another process on simulated devices."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "plan.json"
        command = [
            sys.executable, "train.py", "--config", "benchmarks/llama_1b.py", *arguments, "--plan",
            "--plan-device", device, "--plan-devices", str(devices), "--plan-file", str(file),
        ]  # fmt: skip
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        subprocess.run(command, cwd=ROOT, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="A LoRA step of a decoder like Llama 3.2 1B.")
    parser.add_argument("--repeats", type=int, default=20)
    for name in ("layers", "hidden", "vocabulary", "rows", "length"):
        parser.add_argument(f"--{name}", type=int, default=getattr(config, name))
    args = vars(parser.parse_args())
    repeats = args.pop("repeats")
    chosen = dataclasses.replace(config, **args)
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    name = KINDS.get(kind, "h100-80gb")
    flags = [part for key, value in args.items() for part in (f"--{key}", str(value))]
    planned = plan(flags, name, count)
    found = measure(chosen, repeats)
    tokens = chosen.rows * chosen.length
    achieved = model_flops(chosen) / found["seconds"] / count
    lora = planned["runs"]["lora"]
    bound, total = lora["roofline"]["seconds"], lora["bytes"]["total"]
    lines = [
        ("seconds a step", f"{found['seconds']:.4f}", f"{bound:.4f}"),
        ("tokens/s", f"{tokens / found['seconds']:,.0f}", f"{tokens / bound:,.0f}"),
        ("memory of a device, GB", f"{found['peak'] / 1e9:.2f}", f"{total / 1e9:.2f}"),
        ("model FLOP/s of a device, T", f"{achieved / 1e12:.2f}", ""),
        ("model-FLOPs utilisation", f"{achieved / DEVICES[name].flops:.1%}", ""),
    ]
    print(f"{common.hardware()}; {count} x {kind}, planned for {name}\n")
    print(common.table(("", "measured", "plan"), lines))


if __name__ == "__main__":
    main()
