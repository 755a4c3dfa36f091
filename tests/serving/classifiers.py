"""Tiny classifiers, trained by train.py's own code for a few steps."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

import lora_jax
from lora_jax.data.config import DataConfig
from lora_jax.data.process_slice import Shard
from lora_jax.system.console import Console
from lora_jax.training import export, mesh, one_run
from lora_jax.training.classification import classification
from lora_jax.training.config import Config, LoraConfig, OptimizerConfig
from lora_jax.training.text import ModelConfig, TextConfig
from tests.training import tiny

ATTENTION = "**/attention/{query,value}/kernel"


def config_of(
    weights: pathlib.Path,
    source: str,
    *,
    rank: int = 4,
    alpha: float = 8.0,
    targets: tuple[str, ...] = (ATTENTION,),
    fields: tuple[str, ...] = ("text",),
    pooling: Any = "mean",
    trainable: tuple[str, ...] | None = None,
    seed: int = 0,
) -> TextConfig:
    """Return a config of two steps on `source`, at a learning rate that makes them count."""
    return TextConfig(
        workload=classification,
        model=ModelConfig(reference=str(weights), pooling=pooling),
        data=DataConfig(
            source=source,
            text_fields=fields,
            max_length=16,
            buckets=(8,),
            batch_size=16,
            eval_batch_size=16,
        ),
        lora=LoraConfig(rank=rank, alpha=alpha, targets=targets, trainable=trainable),
        optimizer=OptimizerConfig(learning_rate=0.1, schedule="constant", warmup=0.0),
        steps=2,
        evaluate_every=2,
        seed=seed,
    )


def examples(folder: pathlib.Path, label: Any, fields: tuple[str, ...] = ("text",)) -> str:
    """Write {split}.jsonl with 96 and 40 examples, and return the name of the source."""
    return tiny.write_examples(folder, fields, label)


def train_in(path: pathlib.Path, config: TextConfig) -> pathlib.Path:
    """Train a run in `path` as train.py does, and return `path`."""
    path.mkdir(parents=True)
    grid = mesh.make(config.mesh, jax.devices()[:1])
    with jax.set_mesh(grid):
        one_run.train(config, grid, path, Console(quiet=True))
    return path


def export_in(path: pathlib.Path, config: TextConfig) -> pathlib.Path:
    """Export a run with random numbers instead of trained ones, which is quicker."""
    workload = classification(config)
    params, key = _arrays(workload), jax.random.key(config.seed)
    example = next(workload.train(Shard()))
    layout = lora_jax.resolve(
        config.lora.spec, workload.apply, params, example, train=True, key=key
    )
    base, frozen = lora_jax.frozen.split(params, config.lora.trainable or workload.trainable)
    draw = np.random.default_rng(config.seed).standard_normal  # NumPy's compiles nothing
    fresh = jax.eval_shape(lambda: lora_jax.init(key, layout))
    trained = {
        "adapters": jax.tree.map(lambda x: np.float32(0.3 * draw(x.shape)), fresh),
        "base": jax.tree.map(lambda x: np.asarray(x) + np.float32(0.2 * draw(x.shape)), base),
    }
    export.save(path, "best", layout, trained, lora_jax.fingerprint(frozen), about=workload.about)
    return path


def _arrays(workload: Any) -> Any:
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return workload.arrays(jax.tree.map(lambda _: where, workload.params))


def evaluated(run: pathlib.Path, config: Config) -> np.ndarray:
    """Return the best adapter's outputs [N, C] on the validation split, by training's code."""
    workload = config.workload(config)
    params = _arrays(workload)
    layout, adapters, _ = lora_jax.restore(run / "adapters/best")
    trainable = lora_jax.restore(run / "adapters/best").trainable
    params = lora_jax.paths.replace(params, trainable)
    apply = jax.jit(
        lambda batch: lora_jax.adapt(layout, workload.apply)(
            params, adapters, batch, train=False, key=None
        )
    )
    found: dict[int, Any] = {}
    for batch in workload.evaluation["validation"](Shard()):
        rows = zip(batch["index"].tolist(), np.asarray(apply(batch)), strict=True)
        found |= dict(rows)
    return np.stack([found[i] for i in range(len(found))])
