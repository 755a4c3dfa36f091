"""The laws on models of other packages: no kernel is lost, and `adapt == merge` on every target.

The packages are listed in tests/foreign/requirements.txt; models of packages that are not installed
are skipped.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

import lora_jax
from tests import laws
from tests.foreign import models

pytestmark = pytest.mark.filterwarnings("default")  # other people's warnings

build = functools.cache(lambda name: models.REGISTRY[name]())


def resolved(name: str) -> tuple[lora_jax.Layout, tuple[Any, ...]]:
    f, params, args = build(name)
    return lora_jax.resolve(lora_jax.LoraSpec(1, 2.0), f, params, *args), (f, params, *args)


@pytest.mark.few(14)
@pytest.mark.parametrize("name", list(models.REGISTRY))
def test_every_kernel_is_a_target_or_named(name: str) -> None:
    layout, call = resolved(name)
    assert layout.targets
    laws.assert_complete(layout, *call)


LARGE = {"keras_mobile_net_v2"}  # it takes half a minute to compile; another model has its layers


@pytest.mark.few(12)
@pytest.mark.parametrize("name", [n for n in models.REGISTRY if n not in LARGE])
def test_adapt_equals_merge(name: str) -> None:
    layout, call = resolved(name)
    laws.assert_adapt_equals_merge(layout, *call)
