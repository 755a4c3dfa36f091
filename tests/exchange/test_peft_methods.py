"""Adapters of PEFT's methods other than LoRA, which the published PEFT wrote."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
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
    "toy_loha": {"loha", "lora"}, "toy_lokr": {"lokr", "lora"}, "ia3": {"ia3", "ia3_inputs"},
    "ia3_bert": {"ia3", "ia3_inputs", "bias"}, "ia3_biased": {"ia3", "ia3_inputs", "bias"},
    "oft": {"oft"}, "oft_cayley": {"oft_cayley"}, "miss": {"miss"}, "miss_uneven": {"miss"},
    "tokens": {"tokens"}, "tokens_tied": {"tokens"},
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


CASES = [(name, False) for name in KINDS] + [
    (name, True) for name in ("loha", "lokr_factor", "oft")
]


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


@pytest.mark.few(3)
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["ia3", "ia3_biased", "ia3_bert", "oft", "oft_cayley"])
def test_what_peft_wrote_is_written_again(name: str, scan: bool, tmp_path: Path) -> None:
    """PEFT has these kinds alone: the folder that is written has the numbers of PEFT's own."""
    model, *_ = opened(name, scan)
    adapter = peft.load(METHODS / name, model.names, model.f, model.params, model.x)
    options = {"params": model.params, "task_type": "SEQ_CLS" if "bert" in name else None}
    saved = peft.save(tmp_path / "a", model.names, adapter, base="org/name", **options)
    assert "vllm" in str(saved) and "refuses peft_type=" in str(saved)
    before, after = (peft.describe(folder) for folder in (METHODS / name, tmp_path / "a"))
    assert after.settings["peft_type"] == before.settings["peft_type"]
    files = [tensor_file.read(f / peft.TENSORS).tensors for f in (METHODS / name, tmp_path / "a")]
    assert {*files[0]} == {*files[1]}
    for key, x in files[0].items():
        np.testing.assert_array_equal(files[1][key], x, err_msg=key)
    again = peft.load(tmp_path / "a", model.names, model.f, model.params, model.x)
    for path, arrays in adapter.parameters.items():
        for x, y in zip(arrays, again.parameters[path], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-6, err_msg=path)


def test_what_no_folder_can_say(tmp_path: Path) -> None:
    """A bias that PEFT's (IA)3 would multiply, two methods, blocks of two sizes, other formats."""
    model, *_ = opened("ia3_biased")
    adapter = peft.load(METHODS / "ia3_biased", model.names, model.f, model.params, model.x)
    kernels = adapter.layout.subset("**/kernel")
    alone = lora_jax.Adapter(kernels, {t.path: adapter.parameters[t.path] for t in kernels.targets})
    save = functools.partial(peft.save, tmp_path / "a", model.names, base="")
    with pytest.raises(lora_jax.LoraError, match=r"multiplies '.*k_proj.bias' by the gains"):
        save(alone, params=model.params)
    with pytest.raises(lora_jax.LoraError, match="pass params="):
        save(alone)
    with pytest.raises(lora_jax.LoraError, match=r"(?s)portable.*the kind 'ia3'"):
        save(alone, profile="portable", params=model.params)
    plain = lora_jax.resolve(lora_jax.LoraSpec(2, targets="**/q/kernel"), *traced(model))
    both = {**alone.parameters, **lora_jax.init(jax.random.key(0), plain)}
    two = lora_jax.Layout((*kernels.targets, *plain.targets))
    with pytest.raises(lora_jax.LoraError, match=r"kinds ia3, ia3_inputs, lora, and a PEFT folder"):
        save((two, both), params=model.params)
    sizes = tuple(lora_jax.Rule(f"layers_{i}/**/q/kernel", rank=4 * (i + 1)) for i in (0, 1))
    rotated = lora_jax.resolve(lora_jax.LoraSpec(targets=sizes, kind="oft"), *traced(model))
    with pytest.raises(lora_jax.LoraError, match=r"blocks of 4, .*oft_block_size, 8"):
        save((rotated, lora_jax.init(jax.random.key(0), rotated)))
    assert not (tmp_path / "a").exists()


def traced(model: Model) -> tuple[Any, Any, Any]:
    return model.f, model.params, model.x


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["tokens", "tokens_tied"])
def test_trained_rows_are_differences_here_and_values_there(name: str, tmp_path: Path) -> None:
    golden = GOLDEN / "golden_peft" / name
    model = built_in("qwen2" if "tied" in name else "llama")
    adapter = peft.load(golden, model.names, model.f, model.params, model.x)
    assert adapter.layout["embed/embedding"].kind == "tokens" and not adapter.trainable
    save = functools.partial(peft.save, tmp_path / "a", model.names, adapter, base="")
    save(params=model.params)
    before, after = (tensor_file.read(f / peft.TENSORS).tensors for f in (golden, tmp_path / "a"))
    assert {*before} == {*after}
    for key, x in before.items():
        np.testing.assert_allclose(after[key], x, atol=1e-7, err_msg=key)
    numbers = peft.describe(tmp_path / "a").settings["trainable_token_indices"]
    assert numbers == {"model.embed_tokens": [2, 7] if "tied" in name else [1, 5]}
    for options in ({}, {"params": model.params, "profile": "portable"}):
        match = "portable.*trained rows" if options else "has trained rows.*pass params="
        with pytest.raises(lora_jax.LoraError, match=rf"(?s){match}"):
            save(overwrite=True, **options)


WRONG = {
    "a row too many": ("tokens", {"token_indices": [1, 5, 6]}, "2 trained rows for the numbers"),
    "a row that is not there": (
        "tokens",
        {"token_indices": [1, 23]},
        "rows, of which there are 23",
    ),
    "shared blocks": ("oft_shared", {}, "block_share is True: .*merge it in PEFT"),
    "the mini variant": ("miss_mini", {}, "init_weights is 'mini': this variant of MiSS"),
    "a constrained rotation": ("oft", {"coft": True}, "coft is True"),
    "a longer series": ("oft", {"num_cayley_neumann_terms": 6}, "num_cayley_neumann_terms=5"),
    "a series before PEFT 0.18": ("oft", {"peft_version": None}, "0.18 and later"),
    "another rank of MiSS": ("miss", {"r": 3}, "r is 3"),
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
