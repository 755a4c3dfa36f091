"""MLX's adapters, read by mlx-lm's rules (written here as it describes them) and by our reader."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraSpec, Rule, models
from lora_jax.exchange import mlx, tensor_file
from lora_jax.models.hf_module import HfModule, HfNames
from tests.exchange.tiny import (
    GOLDEN,
    Model,
    assert_alike,
    built_in,
    drawn,
    experts,
    flat,
    merged,
    toy,
)

QV = "**/{q,v}/kernel"


def load(folder: Path, model: Model) -> lora_jax.Adapter:
    return mlx.load(folder, model.names, model.f, model.params, model.x)


def assert_same(model: Model, adapter: lora_jax.Adapter, folder: Path) -> None:
    mlx.save(folder, model.names, adapter)
    assert_alike(model, adapter, load(folder, model))


# --- by mlx-lm's rules --------------------------------------------------------------------------


def by_mlx_lm(folder: Path, weights: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """Fuse an adapter as mlx-lm loads and fuses it, which is strict in names, ranks and shapes."""
    config = json.loads((folder / "adapter_config.json").read_text())
    asked = config["lora_parameters"]
    assert not [k for k in asked["keys"] if ".layers." in k]  # older versions know none there
    modules = [name.removesuffix(".weight") for name, w in weights.items() if w.ndim == 2]
    first = layers - config["num_layers"] if config["num_layers"] > 0 else 0
    wanted = []
    for name in modules:
        inside = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        in_layer = inside and int(inside[1]) >= first and inside[2] in asked["keys"]
        if in_layer or name in asked["keys"]:
            wanted.append(name)
    allowed = {}
    for name in wanted:
        out, fan_in = weights[f"{name}.weight"].shape
        table = name.endswith("embed_tokens")
        allowed[f"{name}.lora_a"] = (out if table else fan_in, asked["rank"])
        allowed[f"{name}.lora_b"] = (asked["rank"], fan_in if table else out)
        if config["fine_tune_type"] == "dora":
            allowed[f"{name}.m"] = (out,)
    tensors = tensor_file.read(folder / "adapters.safetensors").tensors
    assert {k: x.shape for k, x in tensors.items()} == {k: allowed[k] for k in tensors}
    fused = dict(weights)
    for name in {key.rpartition(".")[0] for key in tensors}:
        w, a, b = weights[f"{name}.weight"], tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        delta = a @ b if name.endswith("embed_tokens") else (a @ b).T
        w = w + np.float32(asked["scale"]) * delta
        if config["fine_tune_type"] == "dora":
            w = (tensors[f"{name}.m"] / np.linalg.norm(w, axis=1))[:, None] * w
        fused[f"{name}.weight"] = w
    return fused


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", LoraSpec(2, 3.0, ("embed/embedding", "lm_head/kernel", QV))),
        ("llama", LoraSpec(2, 3.0, (Rule("layers_1/**/v/kernel", rank=3, alpha=1.0), QV))),
        ("llama", LoraSpec(2, 3.0, "layers_1/**/{q,down}/kernel", kind="dora")),
        ("qwen2", LoraSpec(2, 3.0, ("embed/embedding", QV))),
    ],
    ids=["tables", "ranks", "dora", "tied"],
)
def test_mlx_lms_rules_give_the_merged_model(name: str, spec: LoraSpec, tmp_path: Path) -> None:
    model, folder = built_in(name), GOLDEN / "golden_models" / name
    adapter = drawn(model, spec)
    assert_same(model, adapter, tmp_path / "a")
    weights = tensor_file.read(folder / "model.safetensors").tensors
    fused = by_mlx_lm(tmp_path / "a", weights, 2)
    shutil.copytree(folder, tmp_path / "merged")
    tensor_file.write(tmp_path / "merged" / "model.safetensors", fused, {"format": "pt"})
    want = merged(model, adapter)
    for path, x in flat(models.open(str(tmp_path / "merged")).load()).items():
        np.testing.assert_allclose(x, want[path], atol=2e-6, err_msg=path)


def test_experts_in_one_array(tmp_path: Path) -> None:
    model, adapter = experts()
    assert_same(model, adapter, tmp_path / "a")
    tensors = tensor_file.read(tmp_path / "a" / mlx.TENSORS).tensors
    shapes = {key.removeprefix("model.layers.1."): x.shape for key, x in tensors.items()}
    assert shapes["mlp.switch_mlp.up_proj.lora_a"] == (3, 2, 6)
    assert shapes["mlp.switch_mlp.up_proj.lora_b"] == (3, 6, 2)


def test_a_full_fine_tuning(tmp_path: Path) -> None:
    model = built_in("llama")
    name = "model.layers.0.self_attn.q_proj.weight"
    source = tensor_file.read(GOLDEN / "golden_models" / "llama" / "model.safetensors").tensors
    tensor_file.write(tmp_path / mlx.TENSORS, {name: source[name] + 1}, {})
    (tmp_path / mlx.CONFIG).write_text('{"fine_tune_type": "full", "num_layers": 4}')
    adapter = load(tmp_path, model)
    old = flat(model.params)["layers_0/attention/q/kernel"]
    np.testing.assert_array_equal(adapter.trainable["layers_0/attention/q/kernel"], old + 1)


# --- adapters that the format cannot hold, and hostile folders -----------------------------------


@pytest.mark.parametrize(
    ("name", "spec", "says"),
    [
        ("llama_biased", LoraSpec(2, 3.0, (QV, Rule("**/q/bias", kind="bias"))), "q_proj: a bias"),
        ("llama", LoraSpec(2, 3.0, "embed/embedding", kind="dora"), "embed_tokens: DoRA"),
        ("llama", LoraSpec(2, 3.0, (Rule("**/q/kernel", kind="dora"), QV)), "others are not, and"),
    ],
)
def test_refused(name: str, spec: LoraSpec, says: str, tmp_path: Path) -> None:
    model = built_in(name)
    with pytest.raises(lora_jax.LoraError, match=says):
        mlx.save(tmp_path / "a", model.names, drawn(model, spec))
    assert not list(tmp_path.iterdir())


def test_refused_for_other_reasons(small: Model, good: Path) -> None:
    toys, adapter = toy(), drawn(small, LoraSpec(2, 3.0, "q"))
    with pytest.raises(lora_jax.LoraError, match="conv2: conv"):
        mlx.save(good / "b", toys.names, drawn(toys, LoraSpec(2, 3.0, "conv2/kernel")))
    norm = adapter._replace(trainable={"v": small.params["v"] + 1})
    with pytest.raises(lora_jax.LoraError, match=r"v.weight: trained as a whole(?s:.*)merge the"):
        mlx.save(good / "b", small.names, norm)
    with pytest.raises(lora_jax.LoraError, match="overwrite=True"):
        mlx.save(good, small.names, adapter)


@pytest.fixture
def small() -> Model:
    def f(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["q"]) @ p["v"]

    names: HfNames = {
        "q": HfModule("model.layers.0.q", transposed=True),
        "v": HfModule("model.layers.1.v", transposed=True),
    }
    return Model(f, {"q": jnp.ones((6, 5)), "v": jnp.ones((5, 4))}, names, jnp.ones((2, 6)))


@pytest.fixture
def good(small: Model, tmp_path: Path) -> Path:
    return mlx.save(tmp_path / "a", small.names, drawn(small, LoraSpec(2, 3.0, "{q,v}")))


A, B = "model.layers.0.q.lora_a", "model.layers.0.q.lora_b"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda s, t: t.pop(B),
            r"adapters.safetensors: .*lora_a is there, and .*lora_b",
        ),
        (lambda s, t: t.update({B: np.ones((3, 5))}), "'model.layers.0.q': factors of"),
        (lambda s, t: t.update({A: np.ones((1, 6, 2))}), "'model.layers.0.q': factors of"),
        (lambda s, t: t.update({A: np.ones((7, 2))}), "has 6 inputs, the file 7"),
        (lambda s, t: t.update({B: np.ones((2, 6))}), "'model.layers.0.q' has 6 outputs"),
        (lambda s, t: t.update({A: np.full((6, 2), np.nan)}), f"{A} holds numbers that are not f"),
        (lambda s, t: t.update({"model.layers.0.q.m": np.ones(5)}), "q.m: not the name"),
        (
            lambda s, t: t.update({"model.norm.weight": np.ones(5)}),
            "model.norm.weight: not the name",
        ),
        (lambda s, t: s.update(fine_tune_type="vera"), "config.json: fine_tune_type is 'vera'"),
        (lambda s, t: s.update(peft_type="LORA"), "is read by exchange.peft"),
        (lambda s, t: s.update(num_layers=1), "layers 0 to 1 are adapted, and num_layers is 1"),
        (lambda s, t: s.update(num_layers="2"), "expected lora_parameters"),
        (lambda s, t: s.update(lora_parameters=None), "expected lora_parameters"),
        (lambda s, t: s["lora_parameters"].update(keys=["q"]), "'model.layers.1.v' is not among"),
        (lambda s, t: s["lora_parameters"].update(keys="q"), "keys is q, expected names"),
        (lambda s, t: s["lora_parameters"].update(rank=3), "has rank 2 (?s:.*)says rank 3"),
        (lambda s, t: s["lora_parameters"].update(rank=True), "rank True"),
        (lambda s, t: s["lora_parameters"].update(scale=10**400), "has rank 2 and scale 1000"),
        (lambda s, t: s["lora_parameters"].update(alpha=16), r"has \['alpha'\]; versions of mlx"),
    ],
)
def test_hostile(change: Any, says: str, small: Model, good: Path) -> None:
    settings = json.loads((good / mlx.CONFIG).read_text())
    tensors = dict(tensor_file.read(good / mlx.TENSORS).tensors)
    change(settings, tensors)
    (good / mlx.CONFIG).write_text(json.dumps(settings))
    tensors = {key: np.asarray(x, np.float32) for key, x in tensors.items()}
    tensor_file.write(good / mlx.TENSORS, tensors, {})
    with pytest.raises(lora_jax.LoraError, match=says) as failure:
        load(good, small)
    assert str(good) in str(failure.value)


def test_missing(small: Model, good: Path) -> None:
    for name in (mlx.TENSORS, mlx.CONFIG):
        (good / name).rename(good / "aside")
        with pytest.raises(lora_jax.LoraError, match=f"has no {name}"):
            load(good, small)
        (good / "aside").rename(good / name)
