"""Folders, GGUF files and references that are read, and others that are refused."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import models
from lora_jax.models.weights import families, packages, source
from lora_jax.system.extras import MissingExtraError


def _edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> models.Source:
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)
    return models.open(str(folder))


# ---- folders ---------------------------------------------------------------------------------


def test_missing_and_unknown_tensors_are_both_listed(folder: Callable[[str], Path]) -> None:
    def rename(tensors: dict[str, np.ndarray]) -> None:
        old = "model.layers.1.self_attn.q_proj.weight"
        tensors["model.layers.1.self_attn.query.weight"] = tensors.pop(old)

    with pytest.raises(models.WeightsError) as failure:
        _edit(folder("qwen3"), rename).load()
    text = str(failure.value)
    assert "layers_1/attention/q/kernel <- layers.1.self_attn.q_proj.weight" in text
    assert "no parameter (1):\n  model.layers.1.self_attn.query.weight" in text


def test_misshapen_tensor_names_both_shapes(folder: Callable[[str], Path]) -> None:
    def cut(tensors: dict[str, np.ndarray]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name][:-1].copy()

    with pytest.raises(models.WeightsError) as failure:
        _edit(folder("llama"), cut).load()
    text = str(failure.value)
    assert "layers_0/mlp/up/kernel" in text and "(16, 12)" in text and "(16, 11)" in text


def test_configuration_that_differs_from_the_file(data: Path) -> None:
    model = models.open(str(data / "golden_models" / "qwen2"))
    for change in ({"qkv_bias": False}, {"tied": False}, {"num_layers": 1}, {"qk_norm": True}):
        with pytest.raises(models.WeightsError, match="does not fit the configuration"):
            model.load(dataclasses.replace(model.config, **change))
    bert = models.open(str(data / "golden_models" / "bert"))
    with pytest.raises(models.WeightsError, match="another architecture"):
        model.load(bert.config)


def test_known_names_are_skipped_and_no_others(folder: Callable[[str], Path]) -> None:
    def more(name: str) -> Callable[[dict[str, np.ndarray]], None]:
        return lambda tensors: tensors.update({name: np.zeros(3, np.float32)})

    path = folder("roberta")
    plain = models.open(str(path)).load()
    chex.assert_trees_all_equal(_edit(path, more("roberta.embeddings.position_ids")).load(), plain)
    with pytest.raises(models.WeightsError, match=r"roberta\.embeddings\.position_idz"):
        _edit(path, more("roberta.embeddings.position_idz")).load()


def test_prefixes_and_old_endings(folder: Callable[[str], Path]) -> None:
    path = folder("roberta")
    plain = models.open(str(path)).load()

    def old(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            new = name.removeprefix("roberta.")
            new = new.replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[new.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)

    chex.assert_trees_all_equal(_edit(path, old).load(), plain)


def test_one_tensor_under_two_names(folder: Callable[[str], Path]) -> None:
    def twice(tensors: dict[str, np.ndarray]) -> None:
        tensors["norm.weight"] = tensors["model.norm.weight"] + 1

    with pytest.raises(models.WeightsError, match="are the same tensor"):
        _edit(folder("llama"), twice).load()


def test_head_is_loaded_only_when_asked_for(folder: Callable[[str], Path]) -> None:
    path = folder("roberta")
    head = models.Head("roberta_head", num_classes=3)
    whole = models.open(str(path)).load(head=head)
    assert set(whole) == {"bert", "classifier"}
    chex.assert_trees_all_equal(whole["bert"], models.open(str(path)).load())

    def behead(tensors: dict[str, np.ndarray]) -> None:
        del tensors["classifier.out_proj.bias"]

    with pytest.raises(models.WeightsError, match=r"classifier/out/bias <- classifier\.out_proj"):
        _edit(path, behead).load(head=head)


def test_index_and_files_must_agree(folder: Callable[[str], Path]) -> None:
    path = folder("bert")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["bert.lost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(models.WeightsError, match=r"no file holds: bert\.lost"):
        models.open(str(path)).load()
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.safetensors"):
        models.open(str(path)).load()


def test_bfloat16_files_and_dtypes(folder: Callable[[str], Path]) -> None:
    def halve(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({name: value.astype(jnp.bfloat16) for name, value in tensors.items()})

    path = folder("llama")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), models.open(str(path)).load())
    model = _edit(path, halve)
    low = model.load(dataclasses.replace(model.config, param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype(jnp.bfloat16)}
    chex.assert_trees_all_equal(low, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.load())} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("llama", {"model_type": "gemma"}, "'gemma'; the loaders know"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "by_inverse_layer_idx is True"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types is 'chunked_att"),
        (
            "gemma3",
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default"},
                    "sliding_attention": {"rope_type": "linear", "factor": 2.0},
                }
            },
            r"rope_parameters\.sliding_attention\.rope_type is 'linear'",
        ),
        ("phi3", {"attention_bias": True}, "attention_bias is True"),
        ("phi3", {"rope_parameters": {"rope_type": "dynamic"}}, "rope type is 'dynamic'"),
        ("deberta_v3", {"embedding_size": 6}, "embedding_size is 6"),
        ("deberta_v3", {"pos_att_type": ["p2p"]}, r"pos_att_type is \['p2p'\]"),
        ("deberta_v3", {"relative_attention": False}, "relative_attention is False"),
        ("deberta_v2", {"conv_kernel_size": 4}, "conv_kernel_size is 4"),
        ("modernbert", {"rope_scaling": {"factor": 2.0}}, "rope_scaling is"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    ],
)
def test_what_a_family_lacks_is_refused(
    data: Path, name: str, change: dict[str, Any], says: str
) -> None:
    json_ = json.loads((data / "golden_models" / name / "config.json").read_text())
    with pytest.raises(models.ModelConfigError, match=says):
        families.parse(json_ | change, "config.json")


def test_old_spellings_of_families(data: Path) -> None:
    """Files of transformers 4 are read: Gemma's pattern of layers and two thetas, Phi's "su"."""
    json_ = json.loads((data / "golden_models" / "gemma3" / "config.json").read_text())
    new = families.parse(json_, "")
    old = {k: v for k, v in json_.items() if k not in ("layer_types", "rope_parameters")}
    scaling = {"rope_type": "linear", "factor": 3.0}
    old |= {"rope_theta": 100.0, "rope_local_base_freq": 10.0, "rope_scaling": scaling}
    assert families.parse(old | {"sliding_window_pattern": 2}, "") == new
    long = json.loads((data / "golden_models" / "phi3_long" / "config.json").read_text())
    new = families.parse(long, "")
    rope = dict(long.pop("rope_parameters"))
    long |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    kept = {name: rope[name] for name in ("short_factor", "long_factor")}
    assert families.parse(long | {"rope_scaling": {"type": "su", **kept}}, "") == new


def test_the_layers_that_have_a_window(data: Path) -> None:
    json_ = json.loads((data / "golden_models" / "qwen2" / "config.json").read_text())
    del json_["layer_types"]
    json_ |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = families.parse(json_, "")
    assert config.sliding_window == 4 and config.windowed == (False, True)


def test_layers_that_differ_cannot_be_stacked(data: Path) -> None:
    model = models.open(str(data / "golden_models" / "modernbert"))
    with pytest.raises(models.WeightsError, match=r"has no .*attention_norm.*scan_layers=False"):
        model.load(dataclasses.replace(model.config, scan_layers=True))


def test_experts_go_straight_to_their_devices(data: Path) -> None:
    """Each device holds one expert of every layer, and reads no other."""
    model = models.open(str(data / "golden_models" / "qwen3_moe"))
    config = dataclasses.replace(model.config, scan_layers=True)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("expert",))

    def shard(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*((None, "expert") if leaf.ndim == 4 else ())))

    params = model.load(config, shardings=jax.tree.map(shard, models.shapes(config)))
    chex.assert_trees_all_equal(params, model.load(config))
    gate = params["layers"]["mlp"]["experts"]["gate"]["kernel"]
    assert gate.shape == (2, 4, 12, 6) and gate.addressable_shards[0].data.shape == (2, 1, 12, 6)


def test_an_expert_that_is_missing_is_named(folder: Callable[[str], Path]) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]

    says = (
        r"layers_1/mlp/experts/gate/kernel <- layers\.1\.block_sparse_moe\.experts\.2\.w1\.weight"
    )
    with pytest.raises(models.WeightsError, match=says):
        _edit(folder("mixtral"), drop).load()


def test_a_text_stays_on_its_side_of_a_long_rope(data: Path) -> None:
    config = models.open(str(data / "golden_models" / "phi3_long")).config
    assert [config.most_tokens(prompt) for prompt in (1, 8, 9)] == [9, 9, 16]


def test_old_spelling_of_rope(data: Path) -> None:
    new = json.loads((data / "golden_models" / "llama" / "config.json").read_text())
    old = dict(new)
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = rope
    assert families.parse(old, "") == families.parse(new, "")


# ---- references ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference", ["pypi:numpy/x", "s3:bucket/model", "hub:name", "pypi:a==1", "x.gguf#sha256=12"]
)
def test_other_references_show_the_forms(reference: str) -> None:
    with pytest.raises(source.ModelReferenceError, match=r"pypi:package==version|64 hexadecimal"):
        models.open(reference)


def test_path_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        models.open(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.open(str(tmp_path))


def test_sum_in_a_reference_is_checked(data: Path) -> None:
    with pytest.raises(packages.PackageError, match="expected sha256 0000"):
        models.open(f"{data / 'golden_models' / 'llama'}#sha256={'0' * 64}")


def test_known_packages_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(source.KNOWN, models.MINILM, "0" * 64)
    with pytest.raises(packages.PackageError, match=r"got +sha256 53aa51172d14"):
        models.open(models.MINILM)


def test_hub_is_asked_for_the_revision(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Hub:
        __spec__ = "a stand-in"

        @staticmethod
        def snapshot_download(name: str, **how: Any) -> str:
            asked.append((name, how["revision"], "*.safetensors" in how["allow_patterns"]))
            return str(data / "golden_models" / "qwen2")

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert models.open("hub:some/model@v1").config.qkv_bias
    models.open("hub:some/model")
    assert asked == [("some/model", "v1", True), ("some/model", None, True)]


def test_hub_without_its_package_says_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lora-jax\[hub\]'"):
        models.open("hub:some/model")
