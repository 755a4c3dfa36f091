"""Time one gradient and one whole training step: LoRA over full fine-tuning.

    python -m benchmarks.step_time

Both sides have the same model and the same loss (see `common.py` and `flops.py` for the loss), are
compiled separately and run in turns in one process; the numbers are medians. A step is the
gradient, AdamW and the update, with donated state.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from benchmarks import common


def gradients(setup: common.ModelSetup) -> dict[str, Callable[[], Any]]:
    """Return the compiled gradients, full and LoRA, on the same random parameters and batch."""
    params, batch = setup.arrays()
    full = jax.jit(common.full_gradient(setup))
    runs: dict[str, Callable[[], Any]] = {"full": lambda: full(params, batch)}
    for name, spec in setup.specs().items():
        layout = setup.layout(spec)
        lora = jax.jit(common.lora_gradient(setup, layout))
        adapters = common.adapters(layout)
        runs[name] = lambda lora=lora, adapters=adapters: lora(adapters, params, batch)  # type: ignore[misc]
    return runs


def steps(setup: common.ModelSetup, wanted: Sequence[str] = ()) -> dict[str, Callable[[], Any]]:
    """Return the compiled training steps, full and LoRA; each keeps its own state.

    Args:
        wanted: the names of the steps to return; empty: all.
    """
    (params, batch), specs = setup.arrays(), setup.specs()
    runs = {}
    for name in wanted or ("full", *specs):
        if name == "full":
            # The step donates the parameters, and the LoRA runs still need them, so this makes
            # a copy.
            trained = jax.tree.map(lambda x: x.copy(), params)
            runs[name] = stepping(common.full_gradient(setup), trained, batch)
        else:
            layout = setup.layout(specs[name])
            adapters = common.adapters(layout)
            runs[name] = stepping(common.lora_gradient(setup, layout), adapters, params, batch)
    return runs


def stepping(gradient: Callable[..., Any], trained: Any, *rest: Any) -> Callable[[], Any]:
    """Return a compiled step of AdamW, which keeps its own state."""
    tx = optax.adamw(1e-4)
    state = (trained, jax.jit(tx.init)(trained))

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


def rows(setup: common.ModelSetup, repeats: int) -> list[tuple[str, ...]]:
    """Return the lines of the table for one model."""
    lines: list[tuple[str, ...]] = []
    for what, build in (("gradient", gradients), ("gradient + AdamW", steps)):
        seconds = common.interleaved(build(setup), repeats)
        for name, taken in seconds.items():
            speed = f"{setup.tokens / taken:,.0f}"
            ratio = f"{taken / seconds['full']:.3f}"
            lines.append((setup.name, what, name, f"{taken:.3f}", speed, ratio))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time: LoRA / full fine-tuning.")
    parser.add_argument("--models", nargs="+", choices=common.SETUPS, default=list(common.SETUPS))
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    lines = [line for name in args.models for line in rows(common.SETUPS[name](), args.repeats)]
    print(common.hardware(), end="\n\n")
    print(common.table(("model", "timed", "trained", "s", "tokens/s", "/ full"), lines))


if __name__ == "__main__":
    main()
