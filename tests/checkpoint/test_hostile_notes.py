"""Adapters whose sealed text was changed and sealed again, as a stranger could do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

import lora_jax
from lora_jax import LoraError
from lora_jax.bases.recipe import requantised
from lora_jax.checkpoint import manifest as manifests
from lora_jax.checkpoint import storage
from tests.checkpoint.test_adapter import BASE, SMALL, forge, saved


def test_an_adapter_of_keys_is_refused(tmp_path: Path) -> None:
    tree = {"base": {"head": jax.random.key(0)}}
    notes = {"layout": lora_jax.Layout().to_json(), "base": ["head"], "fingerprint": None}
    folder = storage.absolute(tmp_path / "a")
    storage.write(folder, {"meta": manifests.of(tree, notes).seal(), "arrays": tree})
    with pytest.raises(LoraError, match="base/head is declared as PRNG keys"):
        lora_jax.restore(folder)


def test_keys_that_are_declared_and_not_there(tmp_path: Path) -> None:
    def change(data: Any) -> None:
        data["arrays"]["base/head"][1] = "key<fry>"

    with pytest.raises(LoraError, match=r"damaged: base/head is float32\[3\]"):
        lora_jax.restore(forge(saved(tmp_path / "a"), change))


@pytest.mark.parametrize("stored", [[], 3, {"enc/b": 3}, {"enc/b": {"shape": 4, "hash": "0"}}])
def test_a_fingerprint_that_is_not_one(tmp_path: Path, stored: Any) -> None:
    folder = forge(saved(tmp_path / "a"), lambda data: data["notes"].update(fingerprint=stored))
    with pytest.raises(LoraError, match=r"fingerprint that is not one(.|\n)*--allow-other-base"):
        lora_jax.restore(folder, params=BASE)
    assert lora_jax.restore(folder, params=BASE, allow_other_base=True).layout == SMALL


@pytest.mark.parametrize("field", ["stack", "fold", "parts", "part_axis"])
def test_a_layout_with_an_object_in_it(tmp_path: Path, field: str) -> None:
    def change(data: Any) -> None:
        layout = json.loads(data["notes"]["layout"])
        layout["targets"][0][field] = {}
        data["notes"]["layout"] = json.dumps(layout)

    with pytest.raises(LoraError, match=f"not a target of a layout: {field} is "):
        lora_jax.restore(forge(saved(tmp_path / "a"), change))


@pytest.mark.parametrize(
    "change", [{"scheme": []}, {"block": [64]}, {"layout": 3}, {"layout": "[" * 100_000}]
)
def test_a_recipe_that_is_not_one(change: dict[str, Any]) -> None:
    good = {"scheme": "nf4", "block": 64, "double": False, "layout": SMALL.to_json()}
    with pytest.raises(LoraError, match=r"is not understood|not a layout"):
        requantised(BASE, good | change)
