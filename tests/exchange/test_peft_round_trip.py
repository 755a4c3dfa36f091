"""`load(save(x))` has the merged weights of `x`, for every kind and form."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraSpec, Rule, models
from lora_jax.exchange import peft
from lora_jax.models.hf_module import HfModule, HfNames, fused
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

X = jnp.ones((2, 6))
KINDS = ["lora", "dora", "vera", "loha", "lokr"]


def assert_same(
    model: Model,
    adapter: lora_jax.Adapter,
    folder: Path,
    other: Model | None = None,
    **options: Any,
) -> lora_jax.Adapter:
    """Save and load, and compare the merged weights; `other` is the model that loads."""
    peft.save(folder, model.names, adapter, base="org/name", **options)
    reader = other or model
    again = peft.load(folder, reader.names, reader.f, reader.params, reader.x)
    if other is None:
        assert_alike(model, adapter, again)
    return again


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, tmp_path: Path) -> None:
    model = scanned("h.{layer}.up")
    assert_same(model, drawn(model, LoraSpec(2, 3.0, kind=kind, targets="**")), tmp_path / "a")


@pytest.mark.few(1)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_decoder(scan: bool, tmp_path: Path) -> None:
    model = built_in("llama", scan)
    spec = LoraSpec(2, 3.0, ("**/v/kernel", "**/down/kernel"))
    assert_same(model, drawn(model, spec), tmp_path / "a")


def test_biases_with_and_without_the_base(tmp_path: Path) -> None:
    model = built_in("llama_biased")
    spec = LoraSpec(2, 3.0, ("**/{q,k}/kernel", Rule("**/q/bias", kind="bias")))
    adapter = drawn(model, spec)
    by_difference = assert_same(model, adapter, tmp_path / "a")
    assert not by_difference.trainable
    by_value = assert_same(model, adapter, tmp_path / "b", params=model.params)
    assert set(by_value.trainable) == {f"layers_{i}/attention/q/bias" for i in range(2)}
    alone = drawn(model, LoraSpec(2, 3.0, (Rule("**/q/bias", kind="bias"),)))
    with pytest.raises(lora_jax.LoraError, match=r"q/bias.*pass params="):
        peft.save(tmp_path / "c", model.names, alone, base="b")


def test_ranks_alphas_and_scalings(tmp_path: Path) -> None:
    model = built_in("llama")
    rules = (
        Rule("**/q/kernel", rank=3, alpha=4.0),
        Rule("layers_0/**/v/kernel", rank=2, scaling="alpha/sqrt(r)"),
        Rule("**/down/kernel", rank=4, alpha=0.7),
    )
    adapter = drawn(model, LoraSpec(2, 3.0, rules))
    assert_same(model, adapter, tmp_path / "a")
    assert_same(model, adapter, tmp_path / "b", profile="portable")


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_heads_norms_and_tables(kind: str, tmp_path: Path) -> None:
    model = built_in("llama")
    leaves = flat(model.params)
    spec = LoraSpec(2, 3.0, ("embed/embedding", "lm_head/kernel", "**/q/kernel"), kind=kind)
    adapter = drawn(model, spec, **{"norm/scale": leaves["norm/scale"] + 1})
    assert_same(model, adapter, tmp_path / "a")


def test_a_head_trained_in_full(tmp_path: Path) -> None:
    model = built_in("bert")
    kernel = flat(model.params)["classifier/out/kernel"]
    adapter = drawn(model, LoraSpec(2, 3.0, "**/query/kernel"))
    adapter = adapter._replace(trainable={"classifier/out/kernel": kernel + 1})
    with pytest.raises(lora_jax.LoraError, match=r"classifier.weight.*pass params="):
        peft.save(tmp_path / "a", model.names, adapter, base="b")
    assert_same(model, adapter, tmp_path / "a", params=model.params, task_type="SEQ_CLS")


def test_a_tied_embedding(tmp_path: Path) -> None:
    model = built_in("qwen2")
    adapter = drawn(model, LoraSpec(2, 3.0, ("embed/embedding", "**/q/kernel")))
    assert_same(model, adapter, tmp_path / "a")


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_convolutions(kind: str, tmp_path: Path) -> None:
    model = toy()
    spec = LoraSpec(2, 3.0, ("conv*/kernel", "fused", "out/kernel"), kind=kind)
    assert_same(model, drawn(model, spec), tmp_path / "a")


# --- fused and separate ------------------------------------------------------------------------


def joined_function(p: Any, x: Any) -> Any:
    out = jnp.einsum("bi,io->bo", x, p["qkv"]["kernel"])
    return jnp.tanh(out)


def separate_function(p: Any, x: Any) -> Any:
    return jnp.tanh(jnp.concatenate([x @ p[n]["kernel"] for n in "qkv"], axis=-1))


def kernels() -> dict[str, Any]:
    draw = np.random.default_rng(1).standard_normal
    sizes = {"q": 8, "k": 4, "v": 4}
    return {n: {"kernel": jnp.asarray(draw((6, s)), jnp.float32)} for n, s in sizes.items()}


JOINED = {"qkv": {"kernel": jnp.concatenate([x["kernel"] for x in kernels().values()], axis=1)}}
APART = {f"{n}/kernel": f"attn.{n}_proj" for n in "qkv"}
SLICES = {
    f"{n}/kernel": HfModule("attn.qkv_proj", rows=rows)
    for n, rows in zip("qkv", ((0, 8), (8, 4), (12, 4)), strict=True)
}
PARTS: HfNames = {"qkv/kernel": fused(("attn.q_proj", 8), ("attn.k_proj", 4), ("attn.v_proj", 4))}
FORMS = {
    "ours_fused": Model(joined_function, JOINED, PARTS, X),
    "both_fused": Model(joined_function, JOINED, {"qkv/kernel": "attn.qkv_proj"}, X),
    "theirs_fused": Model(separate_function, kernels(), SLICES, X),
    "none_fused": Model(separate_function, kernels(), APART, X),
}


def outputs(model: Model, adapter: lora_jax.Adapter) -> np.ndarray:
    return np.asarray(
        model.f(lora_jax.merge(adapter.layout, model.params, adapter.parameters), model.x)
    )


@pytest.mark.few(2)
@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["whole", "q_v", "ranks", "dora"])
@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("ours_fused", "none_fused"), ("none_fused", "ours_fused"), ("ours_fused", "ours_fused"),
        ("both_fused", "theirs_fused"), ("theirs_fused", "both_fused"),
        ("theirs_fused", "theirs_fused"),
    ],
)  # fmt: skip
def test_fused_and_separate(writer: str, reader: str, kind: str, tmp_path: Path) -> None:
    """A fused and a separate tree of the same function read each other's adapters."""
    one, two = FORMS[writer], FORMS[reader]
    fused_ours = set(flat(one.params)) == {"qkv/kernel"}
    parts = {"whole": None, "q_v": ((0, 8), (12, 4)), "ranks": ((0, 8), (8, 4), (12, 4))}
    if fused_ours:
        targets: Any = (Rule("qkv/kernel", parts=parts.get(kind)),)
    elif kind == "ranks":
        targets = (Rule("q/kernel", rank=3, alpha=1.0), "{k,v}/kernel")
    else:
        targets = ("{q,v}/kernel",) if kind == "q_v" else ("*/kernel",)
    spec = LoraSpec(2, 3.0, targets, kind="dora" if kind == "dora" else "lora")
    adapter = drawn(one, spec)
    again = assert_same(one, adapter, tmp_path / "a", two)
    np.testing.assert_allclose(outputs(two, again), outputs(one, adapter), atol=2e-6)


def test_parts_that_are_read_have_factors_of_their_own(tmp_path: Path) -> None:
    model = FORMS["ours_fused"]
    adapter = drawn(model, LoraSpec(2, 3.0, (Rule("qkv/kernel", parts=((0, 8), (12, 4))),)))
    again = assert_same(model, adapter, tmp_path / "a")
    assert again.layout == adapter.layout


# --- axes ----------------------------------------------------------------------------------------


def test_heads_and_a_stack_on_the_second_axis(tmp_path: Path) -> None:
    """Layers on axis 1 (MaxText) and heads (Flax) are read and written."""

    def f(p: Any, x: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            q, o = w
            heads = jnp.einsum("bd,dhk->bhk", x, q)
            return jnp.tanh(jnp.einsum("bhk,hkd->bd", heads, o)), None

        both = jnp.moveaxis(p["q"]["kernel"], 1, 0), jnp.moveaxis(p["o"]["kernel"], 1, 0)
        return jax.lax.scan(layer, x, both)[0]

    draw = np.random.default_rng(2).standard_normal
    params = {
        "q": {"kernel": jnp.asarray(draw((6, 3, 2, 4)), jnp.float32)},
        "o": {"kernel": jnp.asarray(draw((2, 3, 4, 6)), jnp.float32)},
    }
    names: HfNames = {
        "q/kernel": "layers.{layer}.q_proj",
        "o/kernel": HfModule("layers.{layer}.o_proj", layer="linear"),
    }
    model = Model(f, params, names, X)
    adapter = drawn(model, LoraSpec(2, 3.0, "*/kernel"))
    assert adapter.layout["q/kernel"].stack == (1,)
    assert_same(model, adapter, tmp_path / "a")
    assert_same(model, adapter, tmp_path / "b", profile="portable", params=params)
    assert peft.tensor_file.read_json(tmp_path / "b" / peft.CONFIG)["target_modules"] == [
        "o_proj",
        "q_proj",
    ]
    norm = {"norm": jnp.ones((6, 3))}
    model = Model(f, params | norm, names | {"norm": "layers.{layer}.norm"}, X)
    adapter = adapter._replace(trainable={"norm": jnp.asarray(draw((6, 3)), jnp.float32)})
    assert_same(model, adapter, tmp_path / "d", params=model.params)
    unsaid: HfNames = {"q/kernel": "layers.{layer}.q_proj", "o/kernel": "layers.{layer}.o_proj"}
    with pytest.raises(lora_jax.LoraError, match=r"(?s)o/kernel.*HfModule\(.*layer='linear'\)"):
        peft.save(tmp_path / "c", unsaid, adapter, base="b")


def test_rotary_pairs_are_put_in_their_order(tmp_path: Path) -> None:
    """A model that rotates (2i, 2i + 1) reads an adapter of one that rotates (i, i + half)."""
    order = np.array([0, 2, 1, 3, 4, 6, 5, 7])
    params = kernels()
    turned = {**params, "q": {"kernel": params["q"]["kernel"][:, order]}}
    plain, other = Model(separate_function, params, APART, X), FORMS["none_fused"]
    names = {**APART, "q/kernel": HfModule("attn.q_proj", rotary=4)}
    other = dataclasses.replace(plain, params=turned, names=names)
    adapter = drawn(plain, LoraSpec(2, 3.0, "{q,k}/kernel", kind="dora"))
    again = assert_same(plain, adapter, tmp_path / "a", other)
    want, got = merged(plain, adapter), merged(other, again)
    np.testing.assert_allclose(got["q/kernel"], want["q/kernel"][:, order], atol=2e-6)
    assert_same(other, again, tmp_path / "b")


def test_a_tree_with_hugging_faces_names_needs_no_table(tmp_path: Path) -> None:
    def f(p: Any, ids: Any) -> Any:
        x = jnp.take(p["model.embed_tokens.weight"], ids, axis=0)
        x = jnp.tanh(jnp.einsum("bti,oi->bto", x, p["model.layers.0.q_proj.weight"]))
        return jnp.einsum("bti,oi->bto", x, p["lm_head.weight"]) + p["lm_head.bias"][None, None]

    draw = np.random.default_rng(2).standard_normal
    shapes = {"model.embed_tokens.weight": (9, 6), "model.layers.0.q_proj.weight": (5, 6)}
    shapes |= {"lm_head.weight": (9, 5), "lm_head.bias": (9,)}
    params = {name: jnp.asarray(draw(shape), jnp.float32) for name, shape in shapes.items()}
    model = Model(f, params, None, jnp.ones((1, 3), jnp.int32))
    spec = LoraSpec(2, 3.0, ("model*",))
    adapter = drawn(model, spec, **{"lm_head.weight": params["lm_head.weight"] + 1})
    assert_same(model, adapter, tmp_path / "a", params=params)


def test_experts_by_number(tmp_path: Path) -> None:
    model, adapter = experts()
    assert_same(model, adapter, tmp_path / "a")
    assert_same(model, adapter, tmp_path / "b", profile="portable")


def test_what_is_written(tmp_path: Path) -> None:
    """Only two files are written, with short names where they are exact, and a note for servers."""
    model = built_in("llama")
    adapter = drawn(model, LoraSpec(2, 3.0, "**/{q,v}/kernel"))
    saved = peft.save(tmp_path / "a", model.names, adapter, base="b", params=model.params)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [peft.CONFIG, peft.TENSORS]
    config = peft.tensor_file.read_json(tmp_path / "a" / peft.CONFIG)
    assert config["target_modules"] == ["q_proj", "v_proj"] and config["lora_alpha"] == 3
    assert "--max-lora-rank 8" in str(saved)
    one_layer = drawn(model, LoraSpec(2, 3.0, "layers_1/**/q/kernel"))
    for params in (None, model.params):
        peft.save(tmp_path / "a", model.names, one_layer, base="b", params=params, overwrite=True)
        config = peft.tensor_file.read_json(tmp_path / "a" / peft.CONFIG)
        assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(lora_jax.LoraError, match="overwrite=True"):
        peft.save(tmp_path / "a", model.names, one_layer, base="b")


DECODERS = ["llama", "qwen3", "gpt2", "gemma2", "gemma3", "phi3", "mixtral", "qwen3_moe"]
HEADS = {"vit": "cls", "deberta_v3": "roberta_head"}
HEADS |= dict.fromkeys(("bert", "roberta", "modernbert", "distilbert"), "roberta_head")


@pytest.mark.parametrize("name", [*DECODERS, *HEADS])
def test_names_of_the_built_in_models(name: str) -> None:
    source = models.open(str(GOLDEN / "golden_models" / name))
    head = models.Head(HEADS[name], 3) if name in HEADS else None
    shapes = {p: x.shape for p, x in flat(source.load(head=head)).items()}
    table = peft.NameTable(models.hf_names(source.config, head), shapes)
    found: list[tuple[str, tuple[int, ...]]] = []
    for file in sorted((GOLDEN / "golden_models" / name).glob("*.safetensors")):
        for tensor in peft.tensor_file.read(file).tensors:
            found += [(place.path, place.at) for place in table.find(tensor)]
    assert len(found) == len(set(found))
    no_module = {"vit/embeddings/position", "vit/embeddings/class_token"}
    assert {path for path, _ in found} == set(shapes) - no_module


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_experts_of_the_built_in_models(name: str, tmp_path: Path) -> None:
    model = built_in(name)
    adapter = drawn(model, LoraSpec(2, 3.0, "**/{gate,up,down}/kernel"))
    assert model.names is not None
    as_one: dict[str, Any] = {}
    for path, entry in model.names.items():
        as_one[path] = entry[1] if isinstance(entry, tuple) else entry
        if path.endswith("down/kernel") and isinstance(entry, str):
            as_one[path] = HfModule(entry, layer="experts")
    for form, names in (("each", model.names), ("one", as_one)):
        peft.save(tmp_path / form, names, adapter, base="b")
        again = peft.load(tmp_path / form, model.names, model.f, model.params, model.x)
        for path, x in merged(model, adapter).items():
            np.testing.assert_allclose(merged(model, again)[path], x, atol=1e-6, err_msg=path)
    keys = peft.tensor_file.read(tmp_path / "each" / peft.TENSORS).tensors
    assert sum(".experts.0." in key for key in keys) == 2 * 2 * 3
    assert "target_parameters" in (tmp_path / "one" / peft.CONFIG).read_text()


def test_a_word_for_each_slice_of_a_stack() -> None:
    """`{gate|up}` names the slices of a stack in order, and there are as many words as slices."""
    table = peft.NameTable({"w": "layers.{layer}.{gate|up}"}, {"w": (3, 2, 4, 5)})
    (entry,) = table.entries("w")
    found = dict(table.tensors("w", entry, (3, 2)))
    assert found[2, 0] == "layers.2.gate.weight" and found[0, 1] == "layers.0.up.weight"
    assert all(table.find(name)[0].at == at for at, name in found.items())
    assert not table.find("layers.0.down.weight")
    with pytest.raises(lora_jax.LoraError, match=r"sizes \[3, 4\], and its name 'layers"):
        list(table.tensors("w", entry, (3, 4)))
