"""GGUF files: the same parameters as the folder, and files that are refused."""

import dataclasses
import json
from pathlib import Path

import chex
import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import models
from lora_jax.models.weights import gguf_file
from tests import npz
from tests.models.gguf_files import of_config, written


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows in the order of llama.cpp's converter."""
    shape = weight.shape
    halves = weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def write_gguf(folder: Path, path: Path, arch: str, *, drop: str = "", more: str = "") -> Path:
    """Write a tiny Hugging Face folder as GGUF in float32."""
    hf = json.loads((folder / "config.json").read_text())
    head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    fields = {**of_config(hf), "attention.key_length": head_dim}
    with written(path, arch, hf["rms_norm_eps"], **fields) as writer:
        writer.add_rope_freq_base(hf["rope_parameters"]["rope_theta"])
        divisors = models.open(str(folder)).config.rope_divisors
        if divisors is not None:
            writer.add_tensor("rope_freqs.weight", np.asarray(divisors, np.float32))
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], hf["num_hidden_layers"])
        for name, tensor in safetensors.numpy.load_file(folder / "model.safetensors").items():
            if arch == "llama" and "q_proj" in name:
                tensor = _permuted(tensor, hf["num_attention_heads"])
            if arch == "llama" and "k_proj" in name:
                tensor = _permuted(tensor, hf["num_key_value_heads"])
            if name != drop:
                writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor)
        if more:
            writer.add_tensor(more, np.zeros(4, np.float32))
    return path


@pytest.mark.parametrize("name", ["llama", "llama_biased", "qwen2", "qwen3"])
def test_gguf_is_the_folder(data: Path, tmp_path: Path, name: str) -> None:
    folder = data / "golden_models" / name
    path = write_gguf(folder, tmp_path / "model.gguf", name.removesuffix("_biased"))
    file, hf = models.open(str(path)), models.open(str(folder))
    ids = {"pad_id": None, "bos_id": None, "eos_id": None}
    got, want = (dataclasses.replace(model.config, **ids) for model in (file, hf))
    same = {"norm_eps": want.norm_eps, "rope_divisors": want.rope_divisors}
    assert got.norm_eps == pytest.approx(want.norm_eps)
    assert got.rope_divisors == pytest.approx(want.rope_divisors)
    assert dataclasses.replace(got, **same) == want
    chex.assert_trees_all_equal(file.load(), hf.load())


def test_permutation_left_in_shows_in_the_logits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden logits detect rows of q and k that are still in GGUF's order: they move far."""
    folder = data / "golden_models" / "llama"
    golden = npz.read(folder / "expected.npz")
    file = models.open(str(write_gguf(folder, tmp_path / "model.gguf", "llama")))
    monkeypatch.setattr(gguf_file, "unpermute", lambda array, heads: array)
    ids = jnp.asarray(golden["input_ids"][:1], jnp.int32)
    logits = jax.jit(models.DecoderModel(file.config).apply)({"params": file.load()}, ids)
    assert np.abs(logits - golden["logits"][:1]).max() > 1e-2


def test_gguf_names_missing_and_unknown(data: Path, tmp_path: Path) -> None:
    path = write_gguf(
        data / "golden_models" / "qwen3",
        tmp_path / "model.gguf",
        "qwen3",
        drop="model.layers.1.mlp.up_proj.weight",
        more="blk.1.ffn_new.weight",
    )
    with pytest.raises(models.WeightsError) as failure:
        models.open(str(path)).load()
    text = str(failure.value)
    assert "layers_1/mlp/up/kernel <- blk.1.ffn_up.weight" in text
    assert "no parameter (1):\n  blk.1.ffn_new.weight" in text


def test_gguf_tokenizer(smollm2: models.Source) -> None:
    tokenizer = smollm2.tokenizer()
    text = "In 2024 I don't like   spaces\n<|im_start|>user é 日本<|im_end|>"
    encoded = tokenizer.encode(text)
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoded.ids) == text.replace("<|im_start|>", "").removesuffix(
        "<|im_end|>"
    )
    # Digits are tokens of their own, contractions are split off, special tokens stay whole.
    assert encoded.tokens[1:6] == ["Ġ", "2", "0", "2", "4"]
    assert "'t" in encoded.tokens and encoded.ids[-1] == smollm2.config.eos_id
    assert smollm2.chat_template.startswith("{% for message in messages %}")
