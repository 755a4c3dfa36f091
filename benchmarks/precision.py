"""Compare adapted and merged models in float32 and in bfloat16.

    python -m benchmarks.precision

SmolLM2-135M with LoRA r=8 on every product, whose factors are random; B is scaled so that the
update of each weight has 5 % of its size. 4 rows of 64 random tokens. The table has the largest
difference of two logits, over the largest logit, and the root mean square of the differences over
that of the logits: of the adapted and the merged model, and of each and the adapted model in
float32.
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from benchmarks import common
from lora_jax import models, paths

SHARE = 0.05


def drawn(layout: lora_jax.Layout, params: Any) -> Any:
    """Return random adapters, each update `SHARE` of its weight in the Frobenius norm."""
    weights, found = paths.flatten(params), {}
    fresh = lora_jax.init(jax.random.key(1), layout)
    for number, target in enumerate(layout.targets):
        a, b = fresh[target.path]
        b = jax.random.normal(jax.random.key(number), b.shape)
        update = jnp.linalg.norm(a.reshape(-1, target.rank) @ b.reshape(target.rank, -1))
        weight = jnp.linalg.norm(weights[target.path].astype(jnp.float32))
        found[target.path] = lora_jax.Factors(a, b * SHARE * weight / update / target.scale)
    return found


def main() -> None:
    argparse.ArgumentParser(description="Adapted and merged, in three dtypes.").parse_args()
    jax.config.update("jax_platforms", "cpu")
    source = models.open(models.SMOLLM2)
    ids = jax.random.randint(jax.random.key(0), (4, 64), 0, source.config.vocab_size)  # type: ignore[union-attr]
    floats = source.load()
    logits: dict[str, jax.Array] = {}
    rows, reference, adapters = [], None, None
    for dtype, kept in (("float32",) * 2, ("bfloat16", "float32"), ("bfloat16",) * 2):
        config = dataclasses.replace(
            source.config, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(kept)
        )
        model = models.DecoderModel(config)  # type: ignore[arg-type]
        params = jax.tree.map(lambda x, kept=kept: x.astype(kept), floats)

        def f(params: Any, ids: Any, model: Any = model) -> jax.Array:
            return model.apply({"params": params}, ids).astype(jnp.float32)

        spec = lora_jax.LoraSpec(rank=8, alpha=16.0, targets="all-linear")
        layout = lora_jax.resolve(spec, f, params, ids)
        adapters = drawn(layout, params) if adapters is None else adapters
        logits = {
            "adapted": jax.jit(lora_jax.adapt(layout, f))(params, adapters, ids),
            "merged": jax.jit(f)(lora_jax.merge(layout, params, adapters), ids),
        }
        reference = logits["adapted"] if reference is None else reference

        def apart(one: Any, two: Any, like: Any = reference) -> str:
            most = jnp.abs(one - two).max() / jnp.abs(like).max()
            usual = jnp.sqrt(jnp.square(one - two).mean() / jnp.square(like).mean())
            return f"{float(most):.1e}, {float(usual):.1e}"

        rows.append(
            (kept, dtype, apart(logits["adapted"], logits["merged"]))
            + tuple(apart(logits[name], reference) for name in ("adapted", "merged"))
        )
    print(f"{common.hardware()}\n")
    header = ("weights", "activations", "adapted - merged", "adapted - float32", "merged - float32")
    print(common.table(header, rows))


if __name__ == "__main__":
    main()
