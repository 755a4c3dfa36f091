"""Write runs of the tiny models in golden_models as train.py would; nothing is trained."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import LoraSpec, models, paths
from lora_jax.analysis.from_base import init_from_base
from lora_jax.bases.recipe import ABOUT, BEGUN, STORED, recipe
from lora_jax.models.weights.stored import LAST

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden" / "golden_models"
LABELS = ("no", "maybe", "yes")


@dataclasses.dataclass(frozen=True)
class GoldenRun:
    """A run: its folder, its model as `f(params, inputs)`, and its trained parameters."""

    folder: pathlib.Path
    f: Any
    inputs: Any
    params: Any
    adapter: lora_jax.Adapter

    @property
    def merged(self) -> Any:
        """Return the parameters that an export should contain, by the definition (`merge`)."""
        layout, adapters, trained = self.adapter
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), self.params)
        return lora_jax.merge(layout, paths.replace(wide, dict(trained)), adapters)

    @property
    def outputs(self) -> Any:
        """Return the outputs of the run without merging."""
        layout, adapters, trained = self.adapter
        params = paths.replace(self.params, dict(trained))
        return lora_jax.adapt(layout, self.f)(params, adapters, self.inputs)


def model_of(config: Any, head: models.Head | None) -> tuple[Any, Any]:
    """Return `(f, inputs)` for the model of a config."""
    draw = np.random.default_rng(0)
    model: Any = models.DecoderModel(config) if head is None else None
    if head is not None:
        model = models.classifier(config, head)
    if isinstance(config, models.VitConfig):
        pixels = draw.standard_normal((2, *config.image_size, config.channels))
        return lambda p, x: model.apply({"params": p}, x), jnp.asarray(pixels, jnp.float32)
    ids = jnp.asarray(draw.integers(3, 19, (2, 7)), jnp.int32)
    return lambda p, ids: model.apply({"params": p}, ids), ids


def write_run(
    folder: pathlib.Path,
    name: str,
    *,
    spec: LoraSpec | None = None,
    scan: bool = False,
    quantize: str | None = None,
    begin: Any = None,
    pooling: str = "roberta_head",
    labels: tuple[str, ...] = LABELS,
    param_dtype: str = "float32",
    trained: str = "",
) -> GoldenRun:
    """Write a run with an adapter that changes the outputs.

    Args:
      folder: the folder of the adapter.
      name: the name of a golden model, or the path of another model.
      spec: the spec of the adapter. None: all linear products.
      scan: whether the layers are stacked.
      quantize: None, "stored", or a scheme of `lora_jax.quantize`.
      begin: None, or a method of `init_from_base`.
      pooling: the pooling of an encoder's head; "last" for a decoder that classifies.
      labels: the classes of the head.
      param_dtype: the dtype of the frozen weights.
      trained: a pattern of parameters that are trained in full, in place of adapters.

    Returns:
      The run.
    """
    reference = str(GOLDEN / name) if (GOLDEN / name).is_dir() else name
    source = models.open(reference)
    config = dataclasses.replace(
        source.config,
        scan_layers=scan,
        dtype=jnp.dtype(param_dtype),
        param_dtype=jnp.dtype(param_dtype),
    )
    pooling = "cls" if isinstance(config, models.VitConfig) else pooling
    decodes = isinstance(config, models.DecoderConfig) and pooling != LAST
    if isinstance(config, models.DecoderConfig) and not decodes:
        config = config.without_logits()
    head = None if decodes else models.Head(pooling, len(labels) or 1)
    f, inputs = model_of(config, head)
    about: dict[str, Any] = {
        "model": {
            "reference": reference,
            "pooling": pooling,
            "scan_layers": scan,
            "dtype": param_dtype,
            "param_dtype": param_dtype,
        }
    }
    params = source.load(config, keep_quantised=quantize == STORED)
    values: dict[str, Any] = {}
    root = config.root
    draw = np.random.default_rng(len(name)).standard_normal
    if head is not None:
        about["labels"] = list(labels)
        shapes = models.shapes(config, head)
        fresh = paths.flatten({"classifier": shapes["classifier"]})
        values = {p: jnp.asarray(0.3 * draw(x.shape), jnp.float32) for p, x in fresh.items()}
        params = paths.replace({**shapes, root: params}, values)
    spec = spec or LoraSpec(2, 3.0, "all-linear" if head is None else f"{root}/**/kernel")
    layout = lora_jax.resolve(spec, f, params, inputs)
    if trained:
        leaves, layout = paths.flatten(params), lora_jax.Layout()
        whole = paths.matching(trained, leaves)
        values |= {
            p: leaves[p] + 0.1 * jnp.asarray(draw(leaves[p].shape), jnp.float32) for p in whole
        }
    floats = params
    if quantize == STORED:
        about[ABOUT] = {"scheme": STORED}
    elif quantize is not None:
        about[ABOUT] = recipe(quantize, layout, None, False)
        params = lora_jax.quantize(params, quantize, layout)
    start = lora_jax.init(jax.random.key(0), layout, params=params)
    if begin is not None:
        about[BEGUN] = begin
        quantised = None if quantize is None else params
        begun = init_from_base(layout, floats, begin, quantised=quantised)
        params, start = begun.params, begun.adapters
    adapters = jax.tree.map(lambda x: x + jnp.asarray(0.3 * draw(x.shape), x.dtype), start)
    adapter = lora_jax.Adapter(layout, adapters, values)
    frozen = lora_jax.fingerprint(params)
    lora_jax.save(folder, adapter, fingerprint=frozen, about=about)
    return GoldenRun(folder, f, inputs, params, adapter)
