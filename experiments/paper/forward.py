"""Compile the forward pass of one model with each method of the paper's Table 1."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

import lora_jax
from experiments import methods
from experiments.methods.sites import ENCODER
from experiments.paper import counts
from lora_jax import models
from lora_jax.errors import LoraError
from lora_jax.paths import Tree
from lora_jax.planner import hlo
from lora_jax.training.method import Method
from measuring.published_models import normal

BASE, MERGED, UNMERGED, LIN, HOULSBY = METHODS = ("base", "merged", "unmerged", "lin", "houlsby")
QUERY_VALUE = f"{ENCODER}/encoder/layer_*/attention/{{query,value}}/kernel"

_METADATA = re.compile(r', metadata=\{(?:[^"}]|"[^"]*")*\}')
_TABLES = re.compile(r"(?ms)^(FileNames|FunctionNames|FileLocations|StackFrames)\n.*?(\n\n|\Z)")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of what a method adds: LoRA's rank on query and value, widths of adapter layers."""

    rank: int
    lin: int
    houlsby: int


def added(config: models.BertConfig, sizes: Sizes) -> dict[str, int]:
    """Return the number of parameters that each method adds to the model, the article's |Θ|.

    Houlsby's method also trains the layer norms of the model. They are not counted, because they
    are part of the model in any case and cost no time.
    """
    d, layers = config.hidden_size, config.num_layers
    lora = counts.lora(sizes.rank, [(d, d)] * 2 * layers)
    return {
        BASE: 0,
        MERGED: lora,
        UNMERGED: lora,
        LIN: counts.adapter(d, sizes.lin, layers, norms=layers),
        HOULSBY: counts.adapter(d, sizes.houlsby, 2 * layers),
    }


class Variant(NamedTuple):
    """A method and its weights: `call(weights, ids [B, T]) -> [B, 2]`."""

    call: Callable[[Tree, Array], Array]
    weights: Tree


def variants(config: models.BertConfig, sizes: Sizes) -> dict[str, Variant]:
    """Return all of `METHODS` on the same random weights; no factor and no adapter layer is zero.

    The model is an encoder with a mean over its tokens and two classes, so that all hidden states
    matter. The merged weights are passed to the function of the base.
    """
    model = models.BertClassifier(config, 2, "mean")
    params = normal(models.shapes(config, models.Head("mean", 2)), 0)

    def through(method: Method) -> Callable[[Tree, Array], Array]:
        return lambda weights, ids: method.apply(model, weights, ids)

    base = through(methods.LORA)
    spec = lora_jax.LoraSpec(sizes.rank, float(sizes.rank), (QUERY_VALUE,))
    layout = lora_jax.resolve(spec, base, params, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    factors = normal(jax.eval_shape(lambda key: lora_jax.init(key, layout), jax.random.key(0)), 1)
    adapted = lora_jax.adapt(layout, base)
    layers = {
        LIN: methods.lin(config, sizes.lin),
        HOULSBY: methods.houlsby(config, sizes.houlsby),
    }
    return {
        BASE: Variant(base, params),
        MERGED: Variant(base, lora_jax.merge(layout, params, factors)),
        UNMERGED: Variant(lambda both, ids: adapted(*both, ids), (params, factors)),
        **{
            name: Variant(through(method), {**params, **normal(method.shapes(), 2)})
            for name, method in layers.items()
        },
    }


def compiled(variant: Variant, batch: int, length: int) -> jax.stages.Compiled:
    """Compile the program of a variant for ids [batch, length], anew at each call."""

    def forward(weights: Tree, ids: Array) -> Array:  # a new function, which is in no cache
        return variant.call(weights, ids)

    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return jax.jit(forward).lower(variant.weights, ids).compile()


def check_merged(programs: Mapping[str, jax.stages.Compiled]) -> None:
    """Raise `LoraError` unless merged LoRA compiles to exactly the program of the base."""
    base, merged = (text(programs[name]).splitlines() for name in (BASE, MERGED))
    if base == merged:
        return
    pairs = zip(base, merged, strict=False)  # if the lengths differ, only the common lines
    first = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
    raise LoraError(
        f"merged LoRA does not compile to the base's own program: {len(base)} lines of HLO and "
        f"{len(merged)}; the first that differ are\n{first[0].strip()}\n{first[1].strip()}"
    )


def text(program: jax.stages.Compiled) -> str:
    """Return the HLO without names and source locations."""
    return _TABLES.sub("", _METADATA.sub("", str(program.as_text())))


def flops(program: jax.stages.Compiled) -> float:
    """Return the FLOPs of one run as XLA counts them, which excludes exponentials and the like."""
    analysis = program.cost_analysis()
    if not analysis or "flops" not in analysis:
        raise LoraError(
            f"the backend {jax.default_backend()} does not count FLOPs; take another, such as "
            "JAX_PLATFORMS=cpu"
        )
    return float(analysis["flops"])


def instructions(program: jax.stages.Compiled) -> int:
    """Count the instructions of a program, including fused ones."""
    module = hlo.parse(str(program.as_text()))
    return sum(len(computation) for computation in module.computations.values())
