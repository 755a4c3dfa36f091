"""Trained rows of an embedding: their law, alone and with LoRA, and what a rule may say of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraError, LoraSpec, Rule, Target
from lora_jax.updates import Rows, kind_of, row_parts
from tests import laws
from tests.cases import normal
from tests.test_transform import assert_close

PARAMS = {"embed": normal(0, 9, 32), "w": normal(1, 32, 32) / 3}
IDS = jnp.array([[1, 5, 2], [6, 5, 0]])
TOKENS = Rule("embed", kind="tokens", parts=row_parts([6, 1, 5]))


def tied(p: Any, ids: Any) -> Any:
    """The embedding is the output head too."""
    return jnp.tanh(jnp.take(p["embed"], ids, axis=0) @ p["w"]) @ p["embed"].T


@pytest.mark.parametrize("base", [None, "nf4"])
def test_the_law_with_lora_and_a_tied_head(base: str | None) -> None:
    layout = lora_jax.resolve(LoraSpec(2, targets=(TOKENS, "w")), tied, PARAMS, IDS)
    assert layout["embed"].parts == ((1, 1), (5, 2))
    params = PARAMS if base is None else lora_jax.quantize(PARAMS, "nf4", layout, block=32)
    adapters = laws.drawn_adapters(layout)
    assert adapters["embed"].delta.shape == (3, 32)

    def both(f: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda ad: (f(ad) ** 2).sum()))(adapters)

    fast = both(lambda ad: lora_jax.adapt(layout, tied)(params, ad, IDS))
    slow = both(lambda ad: tied(lora_jax.merge(layout, params, ad), IDS))
    assert_close(fast, slow, 2e-5)


def test_only_the_chosen_rows_change() -> None:
    layout = lora_jax.resolve(LoraSpec(targets=TOKENS), tied, PARAMS, IDS)
    fresh = lora_jax.init(jax.random.key(0), layout)
    np.testing.assert_array_equal(
        lora_jax.adapt(layout, tied)(PARAMS, fresh, IDS), tied(PARAMS, IDS)
    )
    delta = normal(2, 3, 32)
    merged = lora_jax.merge(layout, PARAMS, {"embed": Rows(delta)})["embed"]
    want = np.array(PARAMS["embed"])
    want[[1, 5, 6]] += np.asarray(delta)  # in ascending order
    np.testing.assert_array_equal(merged, want)


@pytest.mark.parametrize("parts", [(), ((3, 2), (4, 1)), ((8, 2),), ((-1, 1),)])
def test_rows_that_a_table_does_not_have(parts: Any) -> None:
    target = Target("w", (9, 8), (), (0,), (1,), 1, 1.0, kind="tokens", parts=parts)
    with pytest.raises(LoraError, match=r"(?s)rows, of which there are 9.*row_parts.*got parts="):
        kind_of(target).check(target)
