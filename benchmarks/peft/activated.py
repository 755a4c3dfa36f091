"""Read one prompt for four activated adapters, and compare their logits with PEFT's.

    python -m benchmarks.peft.activated [--python PATH]

The base is SmolLM2-135M in float32, each adapter has r=8 on q, v and down, and its invocation are
four tokens. The base reads a prefix of 256 tokens once. Its keys and values serve all adapters,
which then read their invocation and 12 tokens more as one mixed batch. Printed are the largest
difference from the logits of PEFT, which opens the folders that `lora_jax.exchange.peft.save`
writes and reads each whole row, and the medians of the seconds that both ways take here: the prefix
once, or four whole rows.
"""

import argparse
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from benchmarks import commands, common
from benchmarks.exported_model import exported
from benchmarks.peft.compare import HERE, environment
from lora_jax import models, multi
from lora_jax.exchange import peft
from lora_jax.models import cache as caches

PREFIX, REST, COUNT = 256, 12, 4
INVOCATION = (4093, 17, 2048, 311)
SPEC = lora_jax.LoraSpec(8, 16.0, ("layers_*/**/{q,v,down}/kernel",), kind="alora")


def median(f: Callable[[], Any], repeats: int) -> float:
    """Return the seconds of a call, after one that compiles."""
    jax.block_until_ready(f())
    found = []
    for _ in range(repeats):
        began = time.monotonic()
        jax.block_until_ready(f())
        found.append(time.monotonic() - began)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description="Activated adapters: one prefill, PEFT's logits.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--python", type=pathlib.Path, help="a Python with torch and peft")
    args = parser.parse_args()
    source = models.open(models.SMOLLM2)
    assert isinstance(source.config, models.DecoderConfig)
    config, decoder = source.config, models.DecoderModel(source.config)
    params = source.load(config)
    draw = np.random.default_rng(0)
    text = draw.integers(0, config.vocab_size, PREFIX + REST)
    ids = np.concatenate([text[:PREFIX], INVOCATION, text[PREFIX:]])[None]

    def whole(params: Any, ids: Any) -> Any:
        return decoder.apply({"params": params}, ids)

    def read(params: Any, ids: Any, cache: Any) -> Any:
        return decoder.apply({"params": params}, ids, cache, method="decode")

    layout = lora_jax.resolve(SPEC, whole, params, ids)
    shapes = jax.eval_shape(lambda: lora_jax.init(jax.random.key(0), layout))
    one = lambda seed: jax.tree.map(lambda x: x / 2, common.normal(shapes, seed))  # noqa: E731
    members = [lora_jax.Adapter(layout, one(seed), {}) for seed in range(COUNT)]
    many, stacked = multi.stack(members)
    numbers = jnp.arange(COUNT)

    @jax.jit
    def shared(params: Any, stacked: Any) -> Any:
        _, cache = read(params, ids[:, :PREFIX], caches.empty(config, 1, 0))
        each = jax.tree.map(lambda x: jnp.repeat(x, COUNT, 0), cache)
        chosen = multi.activated(multi.select(stacked, numbers), True)
        after = jnp.repeat(ids[:, PREFIX:], COUNT, 0)
        return lora_jax.adapt(many, read)(params, chosen, after, each)[0]

    @jax.jit
    def rows(params: Any, stacked: Any) -> Any:
        every = jnp.repeat(ids, COUNT, 0)
        active = multi.invoked(every, INVOCATION)
        chosen = multi.activated(multi.select(stacked, numbers), active)
        return lora_jax.adapt(many, whole)(params, chosen, every)[:, PREFIX:]

    found = np.asarray(shared(params, stacked))
    base = np.asarray(jax.jit(whole)(params, ids))[:, PREFIX:]
    seconds = [median(lambda f=f: f(params, stacked), args.repeats) for f in (shared, rows)]
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        model = exported(folder)
        for i, member in enumerate(members):
            to, hf = folder / f"adapter_{i}", models.hf_names(config)
            peft.save(to, hf, member, base=str(model), invocation=INVOCATION)
        np.save(folder / "ids.npy", ids)
        python = args.python or environment()
        subprocess.run([python, HERE / "activated_theirs.py", str(folder), str(COUNT)], check=True)
        theirs = np.load(folder / "logits.npy")[:, PREFIX:]
    print(f"{common.hardware('')}; {commands.load()}")
    apart = np.abs(found - theirs).max()
    print(f"logits: {apart:.1e} from PEFT's at most; the adapters change them by ", end="")
    print(f"{np.abs(theirs - base).max():.1f}, and the largest is {np.abs(theirs).max():.1f}")
    print(f"prefix once: {seconds[0]:.2f} s; {COUNT} whole rows: {seconds[1]:.2f} s")
    if not apart < 1e-4 * np.abs(theirs).max():
        raise SystemExit("the logits differ")


if __name__ == "__main__":
    main()
