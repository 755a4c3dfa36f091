"""GGUF adapters, read as the format is described, by the published package, and by ours."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf as package
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraSpec, Rule, models
from lora_jax.exchange import gguf
from lora_jax.exchange.gguf_base import GgufBase
from lora_jax.models.weights.decoder_names import LLAMA
from tests.exchange.tiny import (
    GOLDEN,
    Model,
    assert_alike,
    built_in,
    drawn,
    experts,
    flat,
    merged,
    scanned,
    toy,
)
from tests.models.weights.test_gguf_models import write_gguf

BASE = GgufBase("llama", 4)
QKV = "**/{q,k,v,down}/kernel"


def load(file: Path, model: Model, base: Any = BASE) -> lora_jax.Adapter:
    return gguf.load(file, model.names, model.f, model.params, model.x, base=base)


def assert_same(model: Model, adapter: lora_jax.Adapter, file: Path, base: Any = BASE) -> None:
    gguf.save(file, model.names, adapter, base=base)
    assert_alike(model, adapter, load(file, model, base))


# --- read as the format is described ----------------------------------------------------------

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}


def by_hand(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read the metadata and tensors (float32, float16) of a file as ggml describes the format."""
    data, at = file.read_bytes(), 4
    assert data[:4] == b"GGUF"

    def take(kind: str) -> Any:
        nonlocal at
        at += struct.calcsize(f"<{kind}")
        return struct.unpack(f"<{kind}", data[at - struct.calcsize(f"<{kind}") : at])[0]

    def text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    assert take("I") == 3
    tensors, fields = take("Q"), take("Q")
    found = {}
    for _ in range(fields):
        key, kind = text(), take("I")
        found[key] = text() if kind == 8 else take(SCALARS[kind])
    places = []
    for _ in range(tensors):
        name, axes = text(), take("I")
        shape = [take("Q") for _ in range(axes)]
        places.append((name, shape, {0: "<f4", 1: "<f2"}[take("I")], take("Q")))
    start = -(-at // 32) * 32
    read = {
        name: np.frombuffer(data, kind, int(np.prod(shape)), start + offset).reshape(shape[::-1]).T
        for name, shape, kind, offset in places
    }
    return found, read


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_llama_cpps_rules_give_the_merged_model(name: str, tmp_path: Path) -> None:
    """`W + alpha / rank * B A` on the base's own file is the model that `merge` makes."""
    model, folder = built_in(name), GOLDEN / "golden_models" / name
    base = write_gguf(folder, tmp_path / "base.gguf", name)
    tables = ("embed/embedding", "lm_head/kernel") if name == "llama" else ()
    rules = (*tables, QKV, Rule("layers_0/**/v/kernel", rank=3, alpha=1.0))
    adapter = drawn(model, LoraSpec(2, 3.0, rules[::-1]))
    fields, factors = by_hand(gguf.save(tmp_path / "a.gguf", model.names, adapter, base=base))
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == name
    again = write_gguf(folder, tmp_path / "merged.gguf", name)
    content, (_, weights) = bytearray(again.read_bytes()), by_hand(again)
    for tensor in {key.rpartition(".")[0] for key in factors}:
        a, b, w = factors[f"{tensor}.lora_a"], factors[f"{tensor}.lora_b"], weights[tensor]
        scale = fields["adapter.lora.alpha"] / b.shape[0]
        if tensor == "token_embd.weight":  # [rank, vocabulary] and [rank, width]
            assert (a.shape[1], b.shape[1]) == w.shape[::-1]
            delta = (a.T @ b).T
        else:
            assert (a.shape[0], b.shape[1]) == w.shape and a.shape[1] == b.shape[0]
            delta = a @ b
        old, new = (np.asarray(x.T, np.float32).tobytes() for x in (w, w + scale * delta))
        place = content.find(old)
        content[place : place + len(old)] = new
    again.write_bytes(content)
    want = merged(model, adapter)
    for path, x in flat(models.open(str(again)).load()).items():
        np.testing.assert_allclose(x, want[path], atol=2e-6, err_msg=path)


def test_the_published_reader(tmp_path: Path) -> None:
    model = built_in("llama")
    adapter = drawn(model, LoraSpec(2, 3.0, "**/{q,v}/kernel"))
    file = gguf.save(tmp_path / "a.gguf", model.names, adapter, base=BASE, dtype="float16")
    reader = package.GGUFReader(file)
    assert reader.fields["adapter.lora.alpha"].contents() == 3
    found = {t.name: t for t in reader.tensors}
    assert len(found) == 8 and found["blk.1.attn_v.weight.lora_a"].data.dtype == np.float16
    assert found["blk.1.attn_v.weight.lora_a"].shape.tolist() == [16, 2]  # ggml's order
    assert found["blk.1.attn_v.weight.lora_b"].shape.tolist() == [2, 8]


def test_names_are_those_of_our_own_table() -> None:
    own = {r.hf: r.gguf for r in LLAMA.rows if r.gguf.endswith(".weight") and "norm" not in r.gguf}
    for hf, tensor in own.items():
        module = (hf if hf.startswith("lm_head") else LLAMA.prefix + hf).removesuffix(".weight")
        assert BASE.tensor(module.format(layer=17)) == tensor.format(layer=17)


# --- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "loha"])
def test_every_kind_that_is_a_product(kind: str, tmp_path: Path) -> None:
    model = scanned("model.layers.{layer}.self_attn.q_proj")
    base = GgufBase("qwen2")
    assert_same(model, drawn(model, LoraSpec(2, 3.0, "**", kind=kind)), tmp_path / "a.gguf", base)


def test_ranks_scales_tables_and_half_precision(tmp_path: Path) -> None:
    model = built_in("llama")
    rules = (
        Rule("**/q/kernel", rank=3, alpha=4.0),
        Rule("layers_0/**/v/kernel", scaling="alpha/sqrt(r)"),
        Rule("**/down/kernel", rank=4, alpha=0.7),
        "embed/embedding",
        "lm_head/kernel",
    )
    adapter = drawn(model, LoraSpec(2, 3.0, rules))
    assert_same(model, adapter, tmp_path / "a.gguf")
    gguf.save(tmp_path / "b.gguf", model.names, adapter, base=BASE, dtype="float16")
    want, got = merged(model, adapter), merged(model, load(tmp_path / "b.gguf", model))
    for path in want:
        np.testing.assert_allclose(got[path], want[path], atol=4e-3, err_msg=path)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    model, adapter = experts()
    file, base = tmp_path / "a.gguf", GgufBase("qwen3moe")
    assert_same(model, adapter, file, base)
    shapes = {name: x.shape for name, x in by_hand(file)[1].items()}
    assert shapes["blk.1.ffn_up_exps.weight.lora_a"] == (6, 2, 3)
    assert shapes["blk.1.ffn_up_exps.weight.lora_b"] == (2, 6, 3)


def test_a_tree_with_hugging_faces_names_needs_no_table(tmp_path: Path) -> None:
    def f(p: Any, ids: Any) -> Any:
        x = jnp.take(p["model.embed_tokens.weight"], ids, axis=0)
        return jnp.einsum("bti,oi->bto", x, p["model.layers.3.self_attn.k_proj.weight"])

    draw = np.random.default_rng(2).standard_normal
    shapes = {"model.embed_tokens.weight": (9, 6), "model.layers.3.self_attn.k_proj.weight": (8, 6)}
    params = {name: jnp.asarray(draw(shape), jnp.float32) for name, shape in shapes.items()}
    model = Model(f, params, None, jnp.ones((1, 3), jnp.int32))
    assert_same(model, drawn(model, LoraSpec(2, 3.0, "**")), tmp_path / "a.gguf")


# --- adapters that the format cannot hold ----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spec", "says"),
    [
        ("llama", LoraSpec(2, 3.0, QKV, kind="dora"), r"q_proj: DoRA(?s:.*)Save it as PEFT, or"),
        ("llama_biased", LoraSpec(2, 3.0, (QKV, Rule("**/q/bias", kind="bias"))), "q_proj: a bias"),
        ("qwen2", LoraSpec(2, 3.0, "embed/embedding"), "is the output head too"),
        ("bert", LoraSpec(2, 3.0, "**/query/kernel"), "'bert.encoder.*is not a module of GGUF"),
    ],
)
def test_refused(name: str, spec: LoraSpec, says: str, tmp_path: Path) -> None:
    model = built_in(name)
    base = BASE._replace(architecture="qwen2") if name == "qwen2" else BASE
    with pytest.raises(lora_jax.LoraError, match=says):
        gguf.save(tmp_path / "a.gguf", model.names, drawn(model, spec), base=base)
    assert not list(tmp_path.iterdir())


def test_refused_for_other_reasons(tmp_path: Path) -> None:
    model, file = built_in("llama"), tmp_path / "a.gguf"
    adapter = drawn(model, LoraSpec(2, 3.0, "**/q/kernel"))
    norm = {"norm/scale": flat(model.params)["norm/scale"] + 1}
    shapes = {"blk.0.attn_q.weight": (16, 17)}
    for base, one, says in (
        (BASE, adapter._replace(trainable=norm), r"norm.weight: trained as a whole(?s:.*)merge"),
        (BASE._replace(head_dim=None), adapter, r"attn_q.weight.*head_dim=64"),
        (BASE._replace(head_dim=5), adapter, r"attn_q.weight.*not heads"),
        (BASE._replace(shapes=shapes), adapter, r"attn_q.weight.*\(16, 16\), the base has \(16, 1"),
        (BASE._replace(architecture="grok"), adapter, "'grok': its order of rows is not known"),
    ):
        with pytest.raises(lora_jax.LoraError, match=says):
            gguf.save(file, model.names, one, base=base)
    toys = toy()
    with pytest.raises(lora_jax.LoraError, match="conv2: conv"):
        gguf.save(file, toys.names, drawn(toys, LoraSpec(2, 3.0, "conv2/kernel")), base=BASE)
    large = jax.tree.map(lambda x: 1e5 * x, adapter.parameters)
    with pytest.raises(lora_jax.LoraError, match=r"attn_q.weight.*float16 cannot hold"):
        gguf.save(file, model.names, (adapter.layout, large), base=BASE, dtype="float16")
    gguf.save(file, model.names, adapter, base=BASE)
    with pytest.raises(lora_jax.LoraError, match="overwrite=True"):
        gguf.save(file, model.names, adapter, base=BASE)


# --- hostile files --------------------------------------------------------------------------------

A, B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"


def written(file: Path, tensors: dict[str, Any], fields: dict[str, Any] | None = None) -> Path:
    given = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 3.0}
    given |= fields or {}
    writer = package.GGUFWriter(file, given.pop("general.architecture", "llama"))
    for key, value in given.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_string(key, value)
    for name, x in tensors.items():
        writer.add_tensor(name, np.asarray(x, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


GOOD = {A: np.ones((2, 16)), B: np.ones((16, 2))}


def test_alpha_that_is_not_there_is_scale_one(tmp_path: Path) -> None:
    model = built_in("llama")
    for alpha in (None, 0.0):
        file = written(tmp_path / "a.gguf", GOOD, {"adapter.lora.alpha": alpha})
        assert load(file, model).layout.targets[0].scale == 1


@pytest.mark.parametrize(
    ("tensors", "fields", "says"),
    [
        ({A: GOOD[A]}, {}, f"{B} is not"),
        ({A: GOOD[A], B: np.ones((16, 3))}, {}, "layers.0.self_attn.q_proj': factors of"),
        ({A: GOOD[A], B: np.ones((3, 16, 2))}, {}, "layers.0.self_attn.q_proj': factors of"),
        ({A: np.ones((2, 15)), B: GOOD[B]}, {}, "has 16 inputs, the file 15"),
        ({A: GOOD[A], B: np.ones((12, 2))}, {}, "q_proj' has 12 outputs"),
        ({A: GOOD[A], B: np.full((16, 2), np.nan)}, {}, f"{B} holds numbers that are not finite"),
        (GOOD | {"output_norm.weight": np.ones(16)}, {}, "output_norm.weight: not the name of a f"),
        ({k.replace("attn_q", "attn_z"): x for k, x in GOOD.items()}, {}, "attn_z.weight' is no m"),
        ({k.replace("blk.0", "blk.7"): x for k, x in GOOD.items()}, {}, "blk.7.attn_q.weight' is"),
        (GOOD, {"general.type": "model"}, "general.type is 'model', expected 'adapter'"),
        (GOOD, {"adapter.type": "dora"}, "adapter.type is 'dora', expected 'lora'"),
        (GOOD, {"adapter.lora.alpha": float("nan")}, "adapter.lora.alpha is nan"),
        (GOOD, {"adapter.alora.invocation_tokens": [1, 2]}, "adapter.alora.invocation_tokens: an"),
        (GOOD, {"general.architecture": "grok"}, "the architecture is 'grok', of the base"),
        (GOOD, {"general.architecture": "qwen2"}, "the architecture is 'qwen2', of the base 'll"),
    ],
)
def test_hostile(tensors: Any, fields: Any, says: str, tmp_path: Path) -> None:
    file = written(tmp_path / "bad.gguf", tensors, fields)
    with pytest.raises(lora_jax.LoraError, match=rf"bad\.gguf(?s:.*){says}"):
        load(file, built_in("llama"))
