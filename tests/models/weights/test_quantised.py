"""Quantised weights in files stay quantised: GGUF's blocks, and the tensors of bitsandbytes."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax
from lora_jax import models
from lora_jax.base import is_base
from lora_jax.bases.ggml import GgmlBlocks
from lora_jax.bases.nf4 import FourBit
from lora_jax.bases.quantise import bytes_of
from lora_jax.bases.scaled import ScaledCodes
from lora_jax.models.weights.gguf_file import unpermute
from lora_jax.paths import flatten
from tests import npz
from tests.models.gguf_files import written

SIZES = {"hidden": 256, "heads": 4, "kv_heads": 2, "mlp": 512, "vocab": 24, "layers": 2}
FIELDS = {"embedding_length": 256, "feed_forward_length": 512, "attention.head_count_kv": 2}
KINDS = ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"]
Q = gguf.GGMLQuantizationType
SCALES = {Q.Q6_K: [208], Q.Q4_1: [0, 2], Q.Q4_K: [0, 2], Q.Q5_1: [0, 2]}  # their first bytes


def _write(path: Path, arch: str, kind_of: Callable[[str], str]) -> Path:
    rng = np.random.default_rng(0)
    hidden, mlp = SIZES["hidden"], SIZES["mlp"]
    kv = hidden * SIZES["kv_heads"] // SIZES["heads"]
    matrices = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden)}
    matrices |= {"attn_output": (hidden, hidden), "ffn_gate": (mlp, hidden)}
    matrices |= {"ffn_up": (mlp, hidden), "ffn_down": (hidden, mlp)}
    shapes = {f"blk.{i}.{n}": s for i in range(SIZES["layers"]) for n, s in matrices.items()}
    shapes |= {"token_embd": (SIZES["vocab"], hidden), "output": (SIZES["vocab"], hidden)}
    norms = [f"blk.{i}.{n}" for i in range(SIZES["layers"]) for n in ("attn_norm", "ffn_norm")]
    with written(path, arch, **FIELDS) as writer:
        for name in [*norms, "output_norm"]:
            writer.add_tensor(f"{name}.weight", rng.standard_normal(hidden).astype(np.float32))
        for name, shape in shapes.items():
            kind = Q[kind_of(name)]
            size, length = gguf.GGML_QUANT_SIZES[kind]
            raw = rng.integers(0, 256, (shape[0], shape[1] // size, length), np.uint8)
            for start in SCALES.get(kind, [0]):
                scale = rng.uniform(0.001, 0.01, raw.shape[:2]).astype(np.float16)
                raw[..., start : start + 2] = scale[..., None].view(np.uint8)
            writer.add_tensor(f"{name}.weight", raw.reshape(shape[0], -1), raw_dtype=kind)
    return path


def _same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


# ---- GGUF ------------------------------------------------------------------------------------


@pytest.mark.few(4)
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_kept_and_give_the_expanded_numbers(
    kind: str, scanned: bool, tmp_path: Path
) -> None:
    model = models.open(str(_write(tmp_path / "model.gguf", "llama", lambda name: kind)))
    config = dataclasses.replace(model.config, scan_layers=scanned)
    held, floats = model.load(config, keep_quantised=True), model.load(config)
    bases = {p: x for p, x in flatten(held).items() if is_base(x)}
    assert {type(x) for x in bases.values()} == {GgmlBlocks}
    assert set(bases) == {p for p in flatten(held) if p.endswith(("kernel", "embedding"))}
    _same(lora_jax.dequantize(held), floats)
    stored = sum(x.nbytes for x in jax.tree.leaves(bases))
    length, size = gguf.GGML_QUANT_SIZES[Q[kind]][::-1]
    assert stored == sum(x.size for x in bases.values()) // size * length
    assert jax.tree.map(lambda x: (x.shape, x.dtype), model.shapes(config)) == jax.tree.map(
        lambda x: (x.shape, x.dtype), held
    )


def test_the_fields_are_the_bytes_of_the_file(tmp_path: Path) -> None:
    """The fields hold the file's bytes: only the rows of q change places, and v is as it was."""
    path = _write(tmp_path / "model.gguf", "llama", lambda name: "Q4_1")
    raw = {t.name: np.asarray(t.data) for t in gguf.GGUFReader(path).tensors}
    held = flatten(models.open(str(path)).load(keep_quantised=True))
    q, v = held["layers_1/attention/q/kernel"], held["layers_1/attention/v/kernel"]
    for base, want in (
        (q, unpermute(raw["blk.1.attn_q.weight"], SIZES["heads"])),
        (v, raw["blk.1.attn_v.weight"]),
    ):
        blocks = want.reshape(want.shape[0], -1, 20)
        np.testing.assert_array_equal(base.fields["qs"], blocks[..., 4:])
        d = np.asarray(base.fields["d"])[..., None].view(np.uint8)
        np.testing.assert_array_equal(d, blocks[..., :2])


def test_layers_of_different_kinds(tmp_path: Path) -> None:
    """Layers of different kinds, as in files of mixed precision (Q4_K_M), are kept if they are
    apart, and an error if they are stacked."""
    path = tmp_path / "model.gguf"
    _write(path, "qwen3", lambda name: "Q6_K" if name == "blk.1.ffn_down" else "Q4_K")
    model = models.open(str(path))
    config = dataclasses.replace(model.config, qk_norm=False)
    kinds = {
        p: x.kind for p, x in flatten(model.load(config, keep_quantised=True)).items() if is_base(x)
    }
    assert {p for p, kind in kinds.items() if kind == "Q6_K"} == {"layers_1/mlp/down/kernel"}
    with pytest.raises(models.WeightsError) as failure:
        model.load(dataclasses.replace(config, scan_layers=True), keep_quantised=True)
    text = str(failure.value)
    assert "layers/mlp/down/kernel stacks the layers" in text and "scan_layers=False" in text
    assert "blk.1.ffn_down.weight: GgmlBlocks" in text and "kind=Q6_K" in text


def test_a_kind_that_cannot_be_kept_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    model = models.open(str(_write(path, "llama", lambda n: "Q5_1" if "attn_v" in n else "Q8_0")))
    says = r"blk\.0\.attn_v\.weight of shape \(128, 256\) is quantised as Q5_1; .*Q4_0, Q4_1, Q8_0"
    with pytest.raises(models.WeightsError, match=says):
        model.load(keep_quantised=True)
    assert model.load()["layers_0"]["attention"]["v"]["kernel"].dtype == jnp.float32


def test_shards_of_blocks(tmp_path: Path) -> None:
    """Each device holds its rows or its blocks; a shard that would cut a block is refused."""
    model = models.open(str(_write(tmp_path / "model.gguf", "llama", lambda name: "Q4_K")))
    config = dataclasses.replace(model.config, scan_layers=True)
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))

    def shardings(kernel: PartitionSpec) -> Any:
        def one(path: Any, x: Any) -> NamedSharding:
            cut = "attention" in str(path) and x.ndim == 3
            return NamedSharding(mesh, kernel if cut else PartitionSpec())

        return jax.tree_util.tree_map_with_path(one, models.shapes(config))

    outputs = shardings(PartitionSpec(None, None, "tensor"))
    held = model.load(config, shardings=outputs, keep_quantised=True)
    qs = held["layers"]["attention"]["q"]["kernel"].fields["qs"]
    assert qs.addressable_shards[0].data.shape == (2, 32, 1, 128)
    _same(lora_jax.dequantize(held), model.load(config))
    given = jax.tree.map(lambda x: x.sharding, held)
    _same(model.load(config, shardings=given, keep_quantised=True), held)
    inputs = shardings(PartitionSpec(None, "tensor"))
    with pytest.raises(models.WeightsError, match=r"layers/attention/.* would cut a block"):
        model.load(config, shardings=inputs, keep_quantised=True)


@pytest.mark.slow
def test_smollm2_is_as_small_on_the_device_as_in_its_file(smollm2: models.Source) -> None:
    """Codes, scales and float tensors of a Q4_1 file take less than 1.02 times its bytes."""
    held = smollm2.load(keep_quantised=True)
    kinds = {x.kind for x in flatten(held).values() if is_base(x)}
    assert kinds == {"Q4_1", "Q8_0"}
    assert bytes_of(held) < 1.02 * smollm2.path.stat().st_size
    floats = flatten(smollm2.load())
    for path in ("embed/embedding", "layers_7/attention/k/kernel", "layers_7/mlp/down/kernel"):
        np.testing.assert_array_equal(flatten(held)[path].dense(), floats[path])


# ---- bitsandbytes ----------------------------------------------------------------------------


def _expanded(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return a weight [out, in] from the tensors of its file, by the format's description."""
    stem = name.removesuffix("weight")
    if f"{stem}SCB" in tensors:
        return tensors[name].astype(np.float32) * tensors[f"{stem}SCB"][:, None] / np.float32(127)
    state = json.loads(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
    codes = tensors[name].reshape(-1).view(np.uint8)
    absmax = tensors[f"{name}.absmax"]
    if f"{name}.nested_absmax" in tensors:
        values = tensors[f"{name}.nested_quant_map"][absmax]
        outer = tensors[f"{name}.nested_absmax"][np.arange(absmax.size) // 256]
        absmax = values * outer + np.float32(state["nested_offset"])
    numbers = tensors[f"{name}.quant_map"][np.stack([codes >> 4, codes & 15], axis=1).ravel()]
    size = int(np.prod(state["shape"]))
    scales = absmax[np.arange(size) // state["blocksize"]]
    return (numbers[:size] * scales).reshape(state["shape"])


FOLDERS = {"llama_nf4": FourBit, "llama_nf4_double": FourBit, "llama_int8": ScaledCodes}


@pytest.mark.few(3)
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", FOLDERS)
def test_bitsandbytes_is_kept_and_gives_its_numbers(name: str, scanned: bool, data: Path) -> None:
    folder = data / "golden_models" / name
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    model = models.open(str(folder))
    config = dataclasses.replace(model.config, scan_layers=scanned)
    held = model.load(config, keep_quantised=True)
    bases = {p: x for p, x in flatten(held).items() if is_base(x)}
    assert {type(x) for x in bases.values()} == {FOLDERS[name]}
    assert len(bases) == (7 if scanned else 14)
    for layer in range(2):
        for ours, theirs in (("attention/k", "self_attn.k_proj"), ("mlp/down", "mlp.down_proj")):
            want = _expanded(tensors, f"model.layers.{layer}.{theirs}.weight")
            path = f"layers/{ours}/kernel" if scanned else f"layers_{layer}/{ours}/kernel"
            got = bases[path].dense()[layer] if scanned else bases[path].dense()
            np.testing.assert_allclose(got, want.T, rtol=1e-6, atol=1e-6)
    assert flatten(held)["lm_head/kernel"].dtype == jnp.float32
    floats = model.load(config)
    assert not any(is_base(x) for x in flatten(floats).values())
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6),
        lora_jax.dequantize(held),
        floats,
    )


def test_quantised_golden_models_are_near_the_golden(data: Path) -> None:
    golden = npz.read(data / "golden_models" / "llama" / "expected.npz")
    ids = jnp.asarray(golden["input_ids"][:1], jnp.int32)
    for name, bound in (("llama_int8", 0.02), ("llama_nf4", 0.3)):
        model = models.open(str(data / "golden_models" / name))
        logits = jax.jit(models.DecoderModel(model.config).apply)({"params": model.load()}, ids)
        want = golden["logits"][:1]
        assert np.linalg.norm(logits - want) < bound * np.linalg.norm(want)


@pytest.fixture
def spoiled(data: Path, tmp_path: Path) -> Callable[..., models.Source]:
    """Return a function that changes a quantised folder's tensors or configuration and opens it."""

    def change(name: str, edit: Callable[[dict[str, Any]], Any], **how: Any) -> models.Source:
        shutil.copytree(data / "golden_models" / name, tmp_path / name)
        path = tmp_path / name / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        edit(tensors)
        safetensors.numpy.save_file(tensors, path)
        if how:
            config = json.loads((tmp_path / name / "config.json").read_text())
            (tmp_path / name / "config.json").write_text(json.dumps(config | how))
        return models.open(str(tmp_path / name))

    return change


UP = "model.layers.0.mlp.up_proj.weight"


def _drop(ending: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.pop(UP + ending)


def _move(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({UP + new: tensors.pop(UP + old)})


NF4_STATE = ".quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("keep", [False, True], ids=["floats", "kept"])
@pytest.mark.parametrize(
    ("name", "edit", "says"),
    [
        ("llama_nf4", _move(NF4_STATE, ".quant_state.bitsandbytes__nf3"), "nf3.*supported are"),
        ("llama_nf4", _drop(NF4_STATE), "up_proj.weight has 4-bit statistics of no type"),
        ("llama_nf4", _drop(".quant_map"), "up_proj.weight has no .quant_map"),
        ("llama_nf4_double", _drop(".nested_absmax"), "damaged"),
        ("llama_nf4", lambda t: t.update({UP: t[UP][:-1]}), "95 bytes of 96"),
        (
            "llama_int8",
            lambda t: t.pop(UP.replace("weight", "SCB")),
            r"up_proj.weight is stored as I8\[12, 16\].*quant_method is 'bitsandbytes'.*Supported",
        ),
        (
            "llama_int8",
            lambda t: t.update({UP + "_format": np.array(2, np.uint8)}),
            r"weight_format 2\); supported is 0",
        ),
    ],
)
def test_what_cannot_be_read_is_named(
    name: str, edit: Any, says: str, keep: bool, spoiled: Callable[..., models.Source]
) -> None:
    with pytest.raises(models.WeightsError, match=f"(?s){says}"):
        spoiled(name, edit).load(keep_quantised=keep)


def test_another_scheme_is_an_error(spoiled: Callable[..., models.Source]) -> None:
    def gptq(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.startswith(UP)]:
            del tensors[name]
        stem = UP.removesuffix("weight")
        tensors[f"{stem}qweight"] = np.zeros((2, 12), np.int32)

    model = spoiled("llama_nf4", gptq, quantization_config={"quant_method": "gptq"})
    for keep in (False, True):
        with pytest.raises(models.WeightsError, match=r"qweight is stored as I32.*'gptq'"):
            model.load(keep_quantised=keep)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_experts_stay_quantised_as_one_bank(data: Path, tmp_path: Path, scan: bool) -> None:
    folder = tmp_path / "mixtral"
    shutil.copytree(data / "golden_models" / "mixtral", folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        scale = np.abs(tensors[name]).max(axis=1)
        tensors[name] = np.round(tensors[name] / scale[:, None] * 127).astype(np.int8)
        tensors[name.removesuffix("weight") + "SCB"] = scale
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    source = models.open(str(folder))
    config = dataclasses.replace(source.config, scan_layers=scan)
    floats = flatten(source.load(config))
    kept = flatten(source.load(config, keep_quantised=True))
    banks = {path: base for path, base in kept.items() if is_base(base)}
    assert banks.keys() == {path for path in floats if "/experts/" in path}
    for path, base in banks.items():
        assert base.shape == floats[path].shape
        np.testing.assert_allclose(base.dense(), floats[path], atol=1e-6)
