"""The FLOPs that LoRA saves, as the compiler counts them. Nothing is run.

In full fine-tuning a product costs three: its output, and the gradients of its input and of its
weight. LoRA leaves out the last, so 2/3 is the limit, and the low-rank products are added to it.
The programs have the widths of two published models and fewer layers; `python -m benchmarks.flops`
prints the numbers of the whole models.
"""

import dataclasses

import pytest

from benchmarks import common, flops

SETUPS = {
    "minilm": (common.minilm, common.MINILM, 3),
    "smollm2": (common.smollm2, common.SMOLLM2, 6),
}


@pytest.mark.few(1)
@pytest.mark.standard_promotion
@pytest.mark.parametrize("name", SETUPS)
def test_gradient_flops(name: str) -> None:
    make, config, layers = SETUPS[name]
    full, lora = flops.ratios(make(config=dataclasses.replace(config, num_layers=layers)))
    assert lora["q and v"] / full <= 0.68
    # Rank 8 on every product adds about 3 %. Computing W + s·A·B would cost 0.86 of full
    # fine-tuning.
    assert lora["q and v"] < lora["all-linear"] <= 0.71 * full
