"""Export SmolLM2 with `lora-jax export`, for benchmarks in which transformers opens it."""

import contextlib
import io
import pathlib

import jax
import jax.numpy as jnp

import lora_jax
from lora_jax import models
from lora_jax.cli import export


def exported(folder: pathlib.Path) -> pathlib.Path:
    """Write SmolLM2 as a folder of transformers, merged with an adapter that changes nothing."""
    source = models.open(models.SMOLLM2)
    assert isinstance(source.config, models.DecoderConfig)
    model, ids = models.DecoderModel(source.config), jnp.ones((1, 4), jnp.int32)
    params = source.load(source.config)
    spec = lora_jax.LoraSpec(8, 16.0, targets=("layers_*/attention/{q,v}/kernel",))
    layout = lora_jax.resolve(spec, lambda p, ids: model.apply({"params": p}, ids), params, ids)
    adapter = lora_jax.Adapter(layout, lora_jax.init(jax.random.key(0), layout), {})
    about = {"reference": models.SMOLLM2, "pooling": "mean", "scan_layers": False}
    dtypes = {"dtype": "float32", "param_dtype": "float32"}
    frozen = lora_jax.fingerprint(params)
    lora_jax.save(folder / "run", adapter, fingerprint=frozen, about={"model": about | dtypes})
    arguments = [str(folder / "run"), "--format", "hf", "--out", str(folder / "model")]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = export.main(arguments)
    if status != 0:
        raise RuntimeError(said.getvalue())
    return folder / "model"
