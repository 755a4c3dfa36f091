"""Compare the compiled FLOPs of one gradient: LoRA over full fine-tuning.

    python -m benchmarks.flops

Full fine-tuning is the gradient of the loss with respect to every parameter, including embeddings,
norms, biases and the head. LoRA is the gradient of the same loss with respect to the adapters only
(r=8). The loss is the whole forward pass with its cross entropy; there is no optimizer.
In full fine-tuning a product costs three products (the output, the gradient of its input, the
gradient of its weight). LoRA leaves out the last, so the ratio cannot fall below 2/3, except that
the products before the first adapter need no backward pass. The low-rank products add a little.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import common


def compiled_flops(f: Callable[..., Any], *shapes: Any) -> float:
    """Return the FLOPs of `jit(f)` as XLA counts them after compiling, per device."""
    analysis = jax.jit(f).lower(*shapes).compile().cost_analysis()
    assert analysis is not None, "this backend does not count FLOPs; run it on a CPU"
    return float(analysis["flops"])


def ratios(setup: common.ModelSetup) -> tuple[float, dict[str, float]]:
    """Return the FLOPs of the full gradient, and of the LoRA gradient of each spec."""
    full = compiled_flops(common.full_gradient(setup), setup.shapes, setup.batch)
    lora = {}
    for name, spec in setup.specs().items():
        layout = setup.layout(spec)
        gradient = common.lora_gradient(setup, layout)
        adapters = common.adapter_shapes(layout)
        lora[name] = compiled_flops(gradient, adapters, setup.shapes, setup.batch)
    return full, lora


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiled gradient FLOPs: LoRA / full.")
    parser.add_argument("--models", nargs="+", choices=common.SETUPS, default=list(common.SETUPS))
    rows = []
    for name in parser.parse_args().models:
        setup = common.SETUPS[name]()
        full, lora = ratios(setup)
        for spec, flops in lora.items():
            ratio = f"{flops / full:.3f}"
            rows.append((setup.name, spec, f"{full / 1e9:.1f}", f"{flops / 1e9:.1f}", ratio))
    print(common.hardware(), end="\n\n")
    print(common.table(("model", "LoRA r=8 on", "full, GF", "LoRA, GF", "LoRA / full"), rows))


if __name__ == "__main__":
    main()
