"""Damaged or hostile configurations and tokenizers are an error of this library, at once."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_jax import models
from lora_jax.errors import TokenizerError
from lora_jax.models.weights import families, gguf_tokenizer
from tests.models.gguf_files import written
from tests.models.weights.test_gguf_models import write_gguf

ROPE = {"factor": 2.0, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def stored(data: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((data / "golden_models" / name / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "llama",
            {"head_dim": 2 * 10**9, "rope_parameters": {"rope_type": "linear", **ROPE}},
            "head_dim is 2000000000, expected an integer from 1 to 1,048,576",
        ),
        ("gemma2", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ("llama", {"hidden_size": "64"}, "hidden_size is 64, expected an integer"),
        ("llama", {"hidden_size": True}, "hidden_size is True"),
        ("llama", {"num_attention_heads": 3}, "describes a llama that cannot be"),
        ("llama", {"eos_token_id": []}, r"eos_token_id is \[\], expected a token's id, a list"),
        ("llama", {"model_type": []}, r"model_type is \[\], expected a text"),
        (
            "llama",
            {"rms_norm_eps": "1e-5"},
            "rms_norm_eps is 1e-5, expected a number above 0 and below 1",
        ),
        ("llama", {"rope_parameters": {"rope_type": []}}, "rope_parameters: rope_type is"),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, **ROPE, "low_freq_factor": 4.0}},
            "describes a llama that cannot be: .*division by zero",
        ),
        ("gemma3", {"rope_parameters": {"full_attention": 3}}, "full_attention is 3"),
        ("gemma3", {"layer_types": [[]]}, "layer_types is"),
        ("deberta_v3", {"pos_att_type": [1]}, "describes a deberta-v2 that cannot be"),
        ("vit", {"image_size": [1, 2, 3]}, "image_size is"),
        ("vit", {"patch_size": 5}, "describes a vit that cannot be"),
        ("bert", {"layer_norm_eps": 10**30}, "layer_norm_eps is 10000"),
        ("gpt2", {"n_embd": 1}, "describes a gpt2 that cannot be: head_dim: got 0"),
        ("modernbert", {"layer_types": ["full_attention"]}, "windowed: got 1 values"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings is no, expected true"),
    ],
)
def test_a_config_that_no_model_has(
    data: Path, name: str, change: dict[str, Any], says: str
) -> None:
    """A config that no model has is an error within a second."""
    began = time.monotonic()
    with pytest.raises(models.ModelConfigError, match=f"config.json.*{says}"):
        families.parse(stored(data, name) | change, "config.json")
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"model_type": "llama"', "is not JSON.*; fetch the file again"),
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not UTF-8"),
        (b"[]", "holds a list, expected an object"),
        (b'{"a":' + b"[" * 100_000, "is nested too deeply|is not JSON"),
        (b'{"vocab_size": 3, "vocab_size": 4}', "the key 'vocab_size' is there twice"),
        (b'{"rms_norm_eps": NaN}', "NaN is not a number that JSON has"),
        (b'{"model_type": "\\ud800"}', "half a character"),
    ],
)
def test_files_that_are_not_json(data: Path, tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(models.ModelConfigError, match=f"(?s)config.json.*({says})"):
        models.open(str(tmp_path))
    shutil.copy(data / "golden_models" / "llama" / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(models.WeightsError, match=f"(?s)index.json.*({says})"):
        models.open(str(tmp_path)).load()
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=f"(?s)tokenizer_config.json.*({says})"):
        _ = models.open(str(tmp_path)).chat_template


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model": {"type": "BPE"}}', b"\xff"])
def test_a_tokenizer_that_cannot_be_read(data: Path, tmp_path: Path, content: bytes) -> None:
    shutil.copy(data / "golden_models" / "llama" / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is damaged, or is not a tok"):
        models.open(str(tmp_path)).tokenizer()


@pytest.mark.parametrize("said", [3, {"default": "x"}, [3], [{"name": "default"}]])
def test_a_chat_template_that_is_no_text(data: Path, tmp_path: Path, said: Any) -> None:
    shutil.copy(data / "golden_models" / "llama" / "config.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": said}))
    with pytest.raises(TokenizerError, match=r"chat_template is .* expected a text"):
        _ = models.open(str(tmp_path)).chat_template


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention.key_length": 4 * 10**7}, "attention.key_length is 40000000, expected"),
        ({"attention.head_count": 0}, "attention.head_count is 0"),
        ({"attention.head_count_kv": [2, 4]}, r"attention.head_count_kv is \[2, 4\]"),
        ({"block_count": 2 * 10**9}, "block_count is 2000000000"),
        ({"attention.head_count": 3}, "describes a llama that cannot be"),
    ],
)
def test_a_gguf_that_no_model_has(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "model.gguf"
    with written(path, **change) as writer:
        writer.add_tensor("token_embd.weight", np.zeros((3, 16), np.float32))
    began = time.monotonic()
    with pytest.raises(models.ModelConfigError, match=f"model.gguf.*{says}"):
        models.open(str(path))
    assert time.monotonic() - began < 1


def test_a_gguf_without_embeddings(data: Path, tmp_path: Path) -> None:
    folder = data / "golden_models" / "llama"
    drop = "model.embed_tokens.weight"
    path = write_gguf(folder, tmp_path / "model.gguf", "llama", drop=drop)
    with pytest.raises(models.ModelConfigError, match=r"no field 'token_embd\.weight'"):
        models.open(str(path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "llama"}, "tokenizer is 'llama'.*tokenizer.json instead"),  # SentencePiece
        ({"model": []}, "tokenizer is "),
        ({"pre": []}, "words cut as"),
        ({"tokens": 3}, "lists contradict each other"),
        ({"merges": ["a"]}, "lists contradict each other"),
        ({"token_type": [1]}, "lists contradict each other"),
        ({"add_bos_token": True, "bos_token_id": 9}, "lists contradict each other"),
    ],
)
def test_a_gguf_tokenizer_that_cannot_be(change: dict[str, Any], says: str) -> None:
    good = {"model": "gpt2", "tokens": ["a", "b", "ab"], "merges": ["a b"]}
    fields = {f"tokenizer.ggml.{name}": value for name, value in (good | change).items()}
    with pytest.raises(TokenizerError, match=f"(?s)model.gguf.*{says}"):
        gguf_tokenizer.build(fields, "model.gguf")
