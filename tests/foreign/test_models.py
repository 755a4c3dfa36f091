"""The laws on models of other packages: no kernel is lost, and `adapt == merge` on every target.

The packages are those of tests/foreign/requirements.txt; the models of one that is not installed
are skipped.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import pytest

import lora_jax
from tests import laws
from tests.foreign import models

pytestmark = pytest.mark.filterwarnings("default")  # other people's warnings

build = functools.cache(lambda name: models.REGISTRY[name]())


@pytest.fixture(autouse=True)
def rank_promotion() -> Iterator[None]:
    """Other people's models broadcast as they please."""
    with jax.numpy_rank_promotion("allow"):
        yield


def resolved(name: str) -> tuple[lora_jax.Layout, tuple[Any, ...]]:
    f, params, args = build(name)
    return lora_jax.resolve(lora_jax.LoraSpec(1, 2.0), f, params, *args), (f, params, *args)


def waiting(names: Iterable[str], causes: Mapping[str, str]) -> list[Any]:
    """Parameters; those that wait for a cause to be mended must fail."""
    return [
        pytest.param(name, marks=pytest.mark.xfail(reason=causes[name], strict=True))
        if name in causes
        else name
        for name in names
    ]


UNNAMED = dict.fromkeys(models.REGISTRY, "causes 1, 2: kernels left out without a word")
del UNNAMED["gemma_block"]
REFUSED = {
    "equinox_weight_normalisation": "cause 2: the kernel is lost, the one before is the head",
    "keras_mlp": "cause 1: an output that is no logits makes a layer the head",
    "keras_recurrent_and_separable": "cause 7: a depthwise kernel whose channels are reshaped",
    "nnx_remat_in_scan": "cause 9: unused weights come out of the scan",
}


@pytest.mark.parametrize("name", waiting(models.REGISTRY, UNNAMED))
def test_every_kernel_is_a_target_or_named(name: str) -> None:
    layout, call = resolved(name)
    assert layout.targets
    laws.assert_complete(layout, *call)


LARGE = {"keras_mobile_net_v2"}  # half a minute to compile; its layers are in another model


@pytest.mark.parametrize("name", waiting((n for n in models.REGISTRY if n not in LARGE), REFUSED))
def test_adapt_equals_merge(name: str) -> None:
    layout, call = resolved(name)
    laws.assert_adapt_equals_merge(layout, *call)
