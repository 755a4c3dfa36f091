"""Adapters of PEFT's methods other than LoRA, which the published PEFT wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.exchange import peft, tensor_file
from lora_jax.models.hf_module import fused
from tests import npz
from tests.cases import normal
from tests.exchange.test_peft_golden import logits
from tests.exchange.tiny import GOLDEN, Model, built_in, toy

METHODS = GOLDEN / "golden_methods"
KINDS = {
    "loha": {"loha"}, "loha_patterns": {"loha"}, "loha_saved": {"loha"}, "lokr": {"lokr"},
    "lokr_whole": {"lokr"}, "lokr_factor": {"lora"}, "vera": {"lora"}, "vera_wide": {"lora"},
    "toy_loha": {"loha", "lora"}, "toy_lokr": {"lokr", "lora"},
}  # fmt: skip
"""The kinds that a folder is read as; plain factors where no kind has the arrays."""


def opened(name: str, scan: bool = False) -> tuple[Model, Any, np.ndarray]:
    """Return a golden folder's model, its input and the logits of PEFT."""
    golden = npz.read(METHODS / name / "expected.npz")
    settings = json.loads((METHODS / name / peft.CONFIG).read_text())
    base = Path(settings["base_model_name_or_path"] or "toy").name
    model = toy() if base == "toy" else built_in(base, scan)
    x = golden["x"] if base == "toy" else golden["input_ids"].astype(np.int32)
    return model, jnp.asarray(x), golden["out"]


CASES = [(name, False) for name in KINDS] + [(name, True) for name in ("loha", "lokr_factor")]


@pytest.mark.few(4)
@pytest.mark.parametrize(("name", "scan"), CASES)
def test_logits_are_those_of_peft(name: str, scan: bool) -> None:
    model, x, want = opened(name, scan)
    adapter = peft.load(METHODS / name, model.names, model.f, model.params, model.x)
    assert {t.kind for t in adapter.layout.targets} == KINDS[name]
    assert np.abs(np.asarray(model.f(model.params, x)) - want).max() > 1e-2
    np.testing.assert_allclose(logits(model, adapter, x), want, atol=1e-5)


def copied(name: str, folder: Path, keep: str = "base_model", **settings: Any) -> Path:
    """Copy a golden folder with other settings, and the tensors whose keys have words of `keep`."""
    folder.mkdir()
    config = json.loads((METHODS / name / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(config | settings))
    tensors = tensor_file.read(METHODS / name / peft.TENSORS).tensors
    kept = {key: x for key, x in tensors.items() if any(word in key for word in keep.split())}
    tensor_file.write(folder / peft.TENSORS, kept, {"format": "pt"})
    return folder


def test_parts_of_a_fused_kernel_become_plain_factors(tmp_path: Path) -> None:
    """Theirs are q and v, ours is one kernel in which they are parts: LoHa has none."""
    folder, start = (
        copied("loha", tmp_path / "qv", "layers.0.self_attn"),
        "model.layers.0.self_attn",
    )
    w = {"q": normal(0, 16, 16), "v": normal(1, 16, 8)}
    x = normal(2, 3, 16)
    names = {n: f"{start}.{n}_proj.weight" for n in w}
    apart = lambda p, x: jnp.concatenate([x @ p["q"], x @ p["v"]], 1)  # noqa: E731
    one = lambda p, x: x @ p["qv"]  # noqa: E731
    parts = fused((f"{start}.q_proj.weight", 16), (f"{start}.v_proj.weight", 8))
    two = peft.load(folder, names, apart, w, x)
    whole = {"qv": jnp.concatenate([*w.values()], 1)}
    together = peft.load(folder, {"qv": parts}, one, whole, x)
    assert [t.kind for t in together.layout.targets] == ["lora"]
    got = lora_jax.adapt(together.layout, one)(whole, together.parameters, x)
    want = lora_jax.adapt(two.layout, apart)(w, two.parameters, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


WRONG = {
    "a rank unlike the arrays": ("loha", {"r": 4}, "hada.*r is 4"),
    "no projection": ("vera", {"keep": "lambda"}, "save_projection=True"),
    "half of a pair": ("lokr", {"keep": "w1"}, "lokr_w2_a is not"),
    "an unknown setting": ("lokr", {"use_magic": 1}, "use_magic"),
    "not targeted": ("vera", {"target_modules": ["k_proj"]}, "does not target"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    name, changes, match = WRONG[case]
    model, *_ = opened(name)
    folder = copied(name, tmp_path / "a", **changes)
    with pytest.raises(lora_jax.LoraError, match=rf"(?s){match}"):
        peft.load(folder, model.names, model.f, model.params, model.x)


@pytest.mark.parametrize("name", ["loha", "lokr", "vera"])
def test_a_file_for_other_sizes_is_refused(name: str, tmp_path: Path) -> None:
    folder, x = (
        copied(name, tmp_path / "a", "layers.0.self_attn.q vera_A vera_B"),
        jnp.ones((2, 20)),
    )
    names = {"w": "model.layers.0.self_attn.q_proj.weight"}
    with pytest.raises(lora_jax.LoraError, match=r"(?s)q_proj.*do not fit 'w', which has 20 inp"):
        peft.load(folder, names, lambda p, x: x @ p["w"], {"w": jnp.ones((20, 16))}, x)


def test_a_product_too_large_to_be_real_is_refused(tmp_path: Path) -> None:
    folder = copied("lokr_factor", tmp_path / "a", "layers.0.self_attn.q_proj")
    tensors = dict(tensor_file.read(folder / peft.TENSORS).tensors)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lokr_w1_"
    tensors |= {f"{key}a": np.ones((10**4, 1)), f"{key}b": np.ones((1, 10**4))}
    tensor_file.write(folder / peft.TENSORS, tensors, {"format": "pt"})
    model, *_ = opened("lokr_factor")
    with pytest.raises(lora_jax.LoraError, match=r"q_proj.lokr_w1_a: .*more than"):
        peft.load(folder, model.names, model.f, model.params, model.x)
