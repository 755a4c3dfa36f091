"""Compare a batch whose examples have different adapters with one adapter for the whole batch.

    python -m benchmarks.mixed

Encoder: 64 examples of 32 tokens on a MiniLM-shaped model, LoRA r=8 on q and v. "one adapter" is
the ordinary program, without a stack or ids; in the mixed batches each example selects one of 1, 8
or 64 adapters. It times the forward pass and a whole training step of the factors (gradient,
AdamW), in turns in one process; the throughput is that of "one adapter" over the median.

Single tokens: the forward pass of 256 or 1,024 examples of one token each, with 4, 64 and 1,000
adapters, in both forms of the low-rank product (`lora_jax.multi.segmented_matmul`) and in the form
that the rule chooses.

Loading: `put` of another adapter into the last slot of stacks of 10, 100 and 1,000, and the bytes
of each stack compared with the bytes of its adapters.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax
from benchmarks import common
from lora_jax import models
from lora_jax.multi import segmented_matmul

EXAMPLES, LENGTH = 64, 32
COUNTS = (1, 8, 64)


def build(adapters: int) -> tuple[Any, ...]:
    """Return the model's function, its parameters, a batch, and a list of random adapters."""
    model = models.Bert(common.MINILM)
    ids = jax.random.randint(jax.random.key(0), (EXAMPLES, LENGTH), 0, common.MINILM.vocab_size)

    def f(params: Any, ids: Any) -> Any:
        return model.apply({"params": params}, ids)

    params = jax.jit(model.init)(jax.random.key(1), ids[:1])["params"]
    spec = lora_jax.LoraSpec(8, 16.0, ("encoder/layer*/attention/{query,value}/kernel",))
    layout = lora_jax.resolve(spec, f, params, ids)
    members = [(layout, _random(layout, seed)) for seed in range(adapters)]
    return f, params, ids, layout, members


def _random(layout: lora_jax.Layout, seed: int) -> Any:
    fresh = lora_jax.init(jax.random.key(seed), layout)
    return jax.tree.map(
        lambda x: 0.05 * jax.random.normal(jax.random.key(seed + 1), x.shape), fresh
    )


def runs(counts: tuple[int, ...]) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return what is timed -> side -> a function that runs it once."""
    f, params, ids, layout, members = build(max(counts))
    target = jax.random.normal(jax.random.key(2), jax.eval_shape(f, params, ids).shape)
    out: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "training step": {}}

    def add(name: str, trained: Any, call: Callable[[Any, Any, Any], Any]) -> None:
        def loss(trained: Any, params: Any, ids: Any) -> Any:
            return jnp.mean(jnp.square(call(trained, params, ids) - target))

        forward = jax.jit(call)
        out["forward"][name] = lambda: forward(trained, params, ids)
        out["training step"][name] = _stepping(jax.value_and_grad(loss), trained, params, ids)

    g = lora_jax.adapt(layout, f)
    add("one adapter", members[0][1], lambda adapters, params, ids: g(params, adapters, ids))
    for count in counts:
        common_layout, stacked = lora_jax.multi.stack(members[:count])
        mixed = lora_jax.adapt(common_layout, f)
        numbers = jnp.arange(EXAMPLES) % count

        def call(stacked: Any, params: Any, ids: Any, mixed: Any = mixed, n: Any = numbers) -> Any:
            return mixed(params, lora_jax.multi.select(stacked, n), ids)

        add(f"mixed, {count}", stacked, call)
    return out


def _stepping(gradient: Callable[..., Any], trained: Any, *rest: Any) -> Callable[[], Any]:
    tx = optax.adamw(1e-4)
    state = (jax.tree.map(jnp.copy, trained), jax.jit(tx.init)(trained))

    def step(state: Any, *rest: Any) -> tuple[Any, jax.Array]:
        trained, moments = state
        loss, grads = gradient(trained, *rest)
        updates, moments = tx.update(grads, moments, trained)
        return (optax.apply_updates(trained, updates), moments), loss

    compiled = jax.jit(step, donate_argnums=0)

    def run() -> jax.Array:
        nonlocal state
        state, loss = compiled(state, *rest)
        jax.block_until_ready(state)
        return loss

    return run


def tokens(examples: int, adapters: int, repeats: int) -> tuple[str, ...]:
    """Return a line of the second table: seconds of each form, and the choice of the rule."""
    f, params, _, layout, members = build(1)
    _, stacked = lora_jax.multi.stack(members, size=adapters)
    numbers = jax.random.randint(jax.random.key(0), (examples,), 0, adapters)
    ids = jax.random.randint(jax.random.key(1), (examples, 1), 0, common.MINILM.vocab_size)
    rule = segmented_matmul.pays
    sides: dict[str, Callable[[], Any]] = {}
    for name, pays in (("gather", False), ("grouped", True)):
        segmented_matmul.pays = lambda *_, pays=pays, **__: pays
        g = lora_jax.adapt(layout, f)
        run = jax.jit(
            lambda stacked, numbers, ids, g=g: g(
                params, lora_jax.multi.select(stacked, numbers), ids
            )
        )
        jax.block_until_ready(run(stacked, numbers, ids))
        sides[name] = lambda run=run: run(stacked, numbers, ids)  # type: ignore[misc]
    segmented_matmul.pays = rule
    plain = jax.jit(f)
    sides["base"] = lambda: plain(params, ids)
    seconds = common.interleaved(sides, repeats)
    chosen = "grouped" if rule(examples, adapters + 1, rows=1, rank=8) else "gather"
    numbers_ = (f"{seconds[name] * 1e3:.1f}" for name in ("base", "gather", "grouped"))
    return (str(examples), str(adapters), *numbers_, chosen)


def loading(slots: int, repeats: int) -> tuple[str, ...]:
    """Return a line of the third table: milliseconds to fill the last slot, bytes of the stack."""
    *_, layout, members = build(2)
    layout, stacked = lora_jax.multi.stack(members, size=slots)
    adapters = jax.tree.map(np.asarray, members[1][1])

    def load() -> Any:
        nonlocal stacked
        stacked = lora_jax.multi.put(layout, stacked, slots - 1, lora_jax.Adapter(layout, adapters))
        return stacked

    seconds = common.interleaved({"put": load}, repeats)["put"]
    held = sum(x.nbytes for x in jax.tree.leaves(stacked))
    own = sum(x.nbytes for x in jax.tree.leaves(adapters))
    return (
        f"{slots - 1} of {slots:,}",
        f"{seconds * 1e3:.2f}",
        f"{held / 1e6:.1f}",
        f"{held / own / slots:.4f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    args = parser.parse_args()
    print(common.hardware(), end="\n\n")
    lines = []
    for what, sides in runs(tuple(args.counts)).items():
        seconds = common.interleaved(sides, args.repeats)
        for name, taken in seconds.items():
            ratio = f"{seconds['one adapter'] / taken:.3f}"
            lines.append((what, name, f"{taken:.3f}", f"{EXAMPLES / taken:,.0f}", ratio))
    print(common.table(("timed", "adapters", "s", "examples/s", "/ one adapter"), lines))
    print()
    header = ("examples of one token", "adapters", "base, ms", "gather", "grouped", "the rule")
    cases = [(rows, n) for rows in (256, 1024) for n in (4, 64, 1000)]
    print(common.table(header, [tokens(*case, args.repeats) for case in cases]))
    print()
    slots = [loading(number, 5 * args.repeats) for number in (10, 100, 1000)]
    print(common.table(("slot", "put, ms", "stack, MB", "/ its adapters' own bytes"), slots))


if __name__ == "__main__":
    main()
