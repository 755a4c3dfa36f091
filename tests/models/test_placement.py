"""The placement tables of the built-in models, tested on shapes alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from benchmarks import common
from lora_jax import models, paths, sharding
from lora_jax.models.placement import rules
from tests.models import options
from tests.models.options import DEBERTA, DEBERTA_UNSHARED, FAMILIES, MODERNBERT

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
QWEN = {"qkv_bias": True, "output_bias": True, "qk_norm": True, "tied": False}
SHORT = dataclasses.replace(common.SMOLLM2, num_layers=2)
SIZES = {"hidden_size": 768, "num_heads": 12, "mlp_size": 3072}
VIT = dataclasses.replace(options.VIT, image_size=(224, 224), patch_size=(16, 16), **SIZES)
CASES: dict[str, tuple[Any, models.Head | None]] = {
    "bert": (common.MINILM, None),
    "bert without token types": (dataclasses.replace(common.MINILM, num_token_types=0), None),
    "bert, mean": (common.MINILM, models.Head("mean", 3)),
    "bert, cls": (common.MINILM, models.Head("cls", 3)),
    "bert, many classes": (common.MINILM, models.Head("cls", 1001)),
    "bert, roberta_head": (common.MINILM, models.Head("roberta_head", 3)),
    "deberta": (dataclasses.replace(common.MINILM, **DEBERTA), None),
    "modernbert": (
        dataclasses.replace(common.MINILM, num_layers=2, **MODERNBERT),
        models.Head("roberta_head", 3),
    ),
    "deberta, unshared": (dataclasses.replace(common.MINILM, **DEBERTA_UNSHARED), None),
    "vit": (VIT, models.Head("cls", 3)),
    "llama": (common.SMOLLM2, None),
    "llama, every option": (dataclasses.replace(common.SMOLLM2, **QWEN), None),
    **{name: (dataclasses.replace(SHORT, **options), None) for name, options in FAMILIES.items()},
    "llama, odd vocabulary": (dataclasses.replace(common.SMOLLM2, vocab_size=50257), None),
}


@pytest.mark.matrix
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_covered_divided_and_shared(name: str, scan_layers: bool) -> None:
    """Each parameter has one rule, and a device holds little more than its share."""
    config, head = CASES[name]
    config = dataclasses.replace(config, num_layers=2, scan_layers=scan_layers)
    params = models.shapes(config, head)
    leaves = paths.flatten(params)
    for mesh in MESHES:
        sizes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
        placed = sharding.place(params, sizes, table=rules(config, head))
        cuts = {p: [n for e in placed[p] for n in sharding.names_of(e)] for p in leaves}
        assert not any("data" in names for names in cuts.values())
        held = sum(x.size / math.prod(sizes[n] for n in cuts[p]) for p, x in leaves.items())
        total = sum(x.size for x in leaves.values())
        assert held <= 1.05 * total / (sizes["fsdp"] * sizes["tensor"])
