"""Adapters that the published PEFT wrote give the same logits here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import multi
from lora_jax.exchange import peft
from lora_jax.models.hf_module import HfModule, HfNames
from tests import npz
from tests.exchange.tiny import ADAPTERS, Model, built_in, toy

BASES = {
    "llama": ["plain", "rslora", "patterns", "dora", "dora_rslora", "excluded", "one_layer"]
    + ["regex", "embedding", "dora_embedding", "saved", "named", "tokens", "high_rank"],
    "llama_biased": ["bias_all", "bias_lora_only", "lora_bias"],
    "qwen2": ["tokens_tied", "tied"],
    "bert": ["bert"],
    "roberta": ["roberta"],
}
CASES = [(base, name, False) for base, names in BASES.items() for name in names]
SCANNED = ("patterns", "dora", "one_layer", "embedding", "saved", "bias_lora_only", "tied", "bert")
CASES += [(base, name, True) for base, name, _ in CASES if name in SCANNED]


def logits(model: Model, adapter: lora_jax.Adapter, x: Any) -> np.ndarray:
    """The logits of the merged model; another test checks that `adapt` gives the same."""
    params = lora_jax.paths.replace(model.params, dict(adapter.trainable))
    return np.asarray(model.f(lora_jax.merge(adapter.layout, params, adapter.parameters), x))


def expected(name: str) -> tuple[Any, np.ndarray]:
    golden = npz.read(ADAPTERS / name / "expected.npz")
    out = golden.pop("out")
    x = golden.get("input_ids", golden.get("x"))
    return jnp.asarray(x, jnp.int32 if x.dtype == np.int64 else x.dtype), out


@pytest.mark.few(9)
@pytest.mark.parametrize(("base", "name", "scan"), CASES)
def test_logits_are_those_of_peft(base: str, name: str, scan: bool) -> None:
    model = built_in(base, scan)
    x, want = expected(name)
    adapter = peft.load(ADAPTERS / name, model.names, model.f, model.params, model.x)
    got = logits(model, adapter, x)
    base_out = np.asarray(model.f(model.params, x))
    assert np.abs(base_out - want).max() > 1e-2, "the adapter changes no output"
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["toy", "toy_dora"])
def test_convolutions_and_gpt2s_product(name: str) -> None:
    model = toy()
    x, want = expected(name)
    adapter = peft.load(ADAPTERS / name, model.names, model.f, model.params, x)
    np.testing.assert_allclose(logits(model, adapter, x), want, atol=1e-5)


def test_half_of_a_tied_pair_is_refused() -> None:
    model = built_in("qwen2")
    with pytest.raises(
        lora_jax.LoraError, match=r"(?s)adapter_model.*is the embedding and the out"
    ):
        peft.load(ADAPTERS / "half_tied", model.names, model.f, model.params, model.x)


def test_a_mixed_batch_is_pefts_adapter_names() -> None:
    model, golden = built_in("llama"), npz.read(ADAPTERS / "mixed.npz")
    names = [str(name) for name in golden["names"]]
    loaded = [
        peft.load(ADAPTERS / name, model.names, model.f, model.params, model.x)
        for name in names
        if name != "__base__"
    ]
    layout, stack = multi.stack(loaded)
    chosen = multi.select(stack, jnp.array([0, multi.BASE, 1, 2]))
    ids = jnp.asarray(golden["input_ids"], jnp.int32)
    got = jax.jit(lora_jax.adapt(layout, model.f))(model.params, chosen, ids)
    np.testing.assert_allclose(got, golden["out"], atol=1e-5)


def experts_function(transposed: bool) -> Any:
    turn = (lambda w: w) if transposed else (lambda w: w.swapaxes(1, 2))

    def f(p: Any, x: Any) -> Any:
        each = jnp.broadcast_to(x, (4, *x.shape))
        fused = jnp.einsum("ebi,eio->ebo", each, turn(p["experts"]["gate_up_proj"]))
        gate, up = jnp.split(fused, 2, axis=-1)
        hidden = jnp.tanh(gate) * up
        return jnp.einsum("ebi,eio->ebo", hidden, turn(p["experts"]["down_proj"])).sum(0)

    return f


@pytest.mark.matrix
@pytest.mark.parametrize("form", ["plain", "plain_square", "transposed", "transposed_square"])
@pytest.mark.parametrize("version", ["0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.2"])
def test_experts_by_version(version: str, form: str, tmp_path: Path) -> None:
    name = f"experts_{version}_{form}"
    golden = npz.read(ADAPTERS / name / "expected.npz")
    weights = {k.partition("/")[2]: jnp.asarray(golden[k]) for k in golden if "experts/" in k}
    f, params, x = experts_function("transposed" in form), {"experts": weights}, golden["x"]
    adapter = peft.load(ADAPTERS / name, None, f, params, x)
    model = Model(f, params, None, x)
    np.testing.assert_allclose(logits(model, adapter, x), golden["out"], atol=1e-5)
    peft.save(tmp_path / "again", None, adapter, base="toy")
    again = peft.load(tmp_path / "again", None, f, params, x)
    np.testing.assert_allclose(logits(model, again, x), golden["out"], atol=1e-5)


@pytest.mark.parametrize("version", ["0.18.1", "0.21.2"])
def test_experts_of_kernels_that_are_apart(version: str, tmp_path: Path) -> None:
    """Gate and up are two kernels [experts, in, out] here, and rows of one parameter in PEFT."""
    name = f"experts_{version}_plain"
    golden = npz.read(ADAPTERS / name / "expected.npz")
    both, down = (golden[f"experts/{n}_proj"].swapaxes(1, 2) for n in ("gate_up", "down"))
    weights = {"gate": both[..., :3], "up": both[..., 3:], "down": down}
    params = {n: {"kernel": jnp.asarray(x)} for n, x in weights.items()}

    def f(p: Any, x: Any) -> Any:
        each = jnp.broadcast_to(x, (4, *x.shape))
        gate, up = (jnp.einsum("ebi,eio->ebo", each, p[n]["kernel"]) for n in ("gate", "up"))
        return jnp.einsum("ebi,eio->ebo", jnp.tanh(gate) * up, p["down"]["kernel"]).sum(0)

    start = "experts.{expert}"
    names: HfNames = {
        "gate/kernel": HfModule(f"{start}.gate_up_proj", layer="experts", rows=(0, 3)),
        "up/kernel": HfModule(f"{start}.gate_up_proj", layer="experts", rows=(3, 3)),
        "down/kernel": HfModule(f"{start}.down_proj", layer="experts"),
    }
    model = Model(f, params, names, golden["x"])
    adapter = peft.load(ADAPTERS / name, names, f, params, model.x)
    np.testing.assert_allclose(logits(model, adapter, model.x), golden["out"], atol=1e-5)
    # It is written with one key for each expert too, and is read by either name.
    keys = {n: f"{start}.{n.split('/')[0]}_proj" for n in names}
    either = {n: (HfModule(keys[n]), names[n]) for n in names}
    for number, table in enumerate((names, keys, either)):
        peft.save(tmp_path / str(number), table, adapter, base="b")
        again = peft.load(tmp_path / str(number), either, f, params, model.x)
        np.testing.assert_allclose(logits(model, again, model.x), golden["out"], atol=1e-5)


def test_a_development_version_is_refused(tmp_path: Path) -> None:
    folder, golden = changed("experts_0.21.2_plain", tmp_path, peft_version="0.19.1.dev0")
    weights = {k.partition("/")[2]: golden[k] for k in golden if "experts/" in k}
    with pytest.raises(lora_jax.LoraError, match=r"gate_up_proj.*peft_version is '0.19.1.dev0'"):
        peft.load(folder, None, experts_function(False), {"experts": weights}, golden["x"])


def changed(name: str, tmp_path: Path, **settings: Any) -> tuple[Path, Any]:
    """Copy a golden adapter with other settings."""
    source = ADAPTERS / name
    config = json.loads((source / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | settings))
    tensors = (source / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors)
    return tmp_path, npz.read(source / "expected.npz")
