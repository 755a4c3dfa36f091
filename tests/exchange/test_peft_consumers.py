"""Servers read our folders correctly, by readers written here after the servers' own rules.

The rules are of autumn 2026: vLLM `lora/peft_helper.py` and `lora_model.py`, SGLang's loader,
llama.cpp `convert_lora_to_gguf.py` and `llama-adapter.cpp`, LoRAX `adapters/lora.py`, Ollama
`convert/convert.go`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import lora_jax
from lora_jax import LoraSpec, Rule
from lora_jax.exchange import consumers, peft
from tests.exchange.tiny import Model, built_in, drawn, merged

Deltas = dict[str, np.ndarray]


class RefusedError(Exception):
    """The server refuses the folder."""


def opened(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    settings = json.loads((folder / "adapter_config.json").read_text())
    return settings, safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def pairs(tensors: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the factors by module, and refuse any other tensor."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    for key, x in tensors.items():
        module, dot, ending = key.removeprefix("base_model.model.").rpartition(".lora_")
        if not dot or ending not in ("A.weight", "B.weight") or x.ndim != 2:
            raise RefusedError(key)
        halves.setdefault(module, {})[ending[0]] = x
    return {module: (half["A"], half["B"]) for module, half in halves.items()}


def vllm(folder: Path, max_lora_rank: int = 16) -> Deltas:
    settings, tensors = opened(folder)
    r, alpha = settings["r"], settings["lora_alpha"]
    assert settings["target_modules"]
    if settings.get("modules_to_save") or settings.get("use_dora") or settings["bias"] != "none":
        raise RefusedError("modules_to_save, use_dora or bias")
    if r > max_lora_rank or any("lm_head" in key or "embed_tokens" in key for key in tensors):
        raise RefusedError("rank or embedding")
    scale = alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
    return {module: scale * b @ a for module, (a, b) in pairs(tensors).items()}


def sglang(folder: Path) -> Deltas:
    settings, tensors = opened(folder)
    if settings.get("use_dora") or any("." in name for name in settings["target_modules"]):
        raise RefusedError("DoRA, or a module outside the pool")
    scale = settings["lora_alpha"] / settings["r"]
    return {module: scale * b @ a for module, (a, b) in pairs(tensors).items()}


def llama_cpp(folder: Path) -> Deltas:
    settings, tensors = opened(folder)
    if settings.get("modules_to_save") or any("lm_head" in k or "embed" in k for k in tensors):
        raise RefusedError("embedding or head")
    alpha = np.float32(settings["lora_alpha"])
    return {
        module: (alpha / len(a) if alpha else 1.0) * b @ a
        for module, (a, b) in pairs(tensors).items()
    }


def lorax(folder: Path) -> Deltas:
    settings, tensors = opened(folder)
    r = settings["r"]
    scale = settings["lora_alpha"] / (math.sqrt(r) if settings.get("use_rslora") else r)
    padded = {-(-len(a) // 16) * 16 for a, _ in pairs(tensors).values()}
    if len(padded) > 1 or max(padded) > 128 or settings.get("use_dora"):
        raise RefusedError("ranks that cannot be stacked")
    return {module: scale * b @ a for module, (a, b) in pairs(tensors).items()}


def ollama(folder: Path) -> Deltas:
    settings, _ = opened(folder)
    text = (folder / "adapter_config.json").read_text()
    alpha = settings["lora_alpha"]
    if not isinstance(alpha, int) or alpha < 0 or f'"lora_alpha": {alpha}' not in text:
        raise RefusedError("lora_alpha is not an unsigned integer")
    return llama_cpp(folder)


READERS: dict[str, Callable[[Path], Deltas]] = {
    "vllm": vllm, "sglang": sglang, "llama.cpp": llama_cpp, "lorax": lorax, "ollama": ollama,
}  # fmt: skip
QV = "**/{q,v}/kernel"
SPECS = {
    "plain": LoraSpec(2, 4.0, QV),
    "rslora": LoraSpec(3, 4.0, QV, scaling="alpha/sqrt(r)"),
    "mixed": LoraSpec(
        2, 3.0, (Rule("**/q/kernel", rank=4, alpha=1.5), QV, "layers_1/**/up/kernel")
    ),
    "fraction": LoraSpec(2, 1.5, QV),
    "loha": LoraSpec(2, 3.0, QV, kind="loha"),
    "dora": LoraSpec(2, 4.0, QV, kind="dora"),
    "embedding": LoraSpec(2, 4.0, ("embed/embedding", QV)),
}
PORTABLE = ("plain", "rslora", "mixed", "fraction", "loha")


@pytest.fixture(scope="module")
def model() -> Model:
    return built_in("llama")


@pytest.fixture(scope="module")
def adapters(model: Model) -> dict[str, lora_jax.Adapter]:
    return {name: drawn(model, spec) for name, spec in SPECS.items()}


def wanted(model: Model, adapter: lora_jax.Adapter) -> Deltas:
    """The changes of the weights as [out, in], by the modules' names."""
    table = peft.NameTable(model.names, {t.path: t.shape for t in adapter.layout.targets})
    leaves, after = lora_jax.paths.flatten(model.params), merged(model, adapter)
    found = {}
    for target in adapter.layout.targets:
        (entry,) = table.entries(target.path)
        ((_, tensor),) = table.tensors(target.path, entry, ())
        delta = after[target.path] - np.asarray(leaves[target.path])
        found[tensor.removesuffix(".weight")] = delta.T
    return found


def agrees(got: Deltas, want: Deltas) -> bool:
    return set(got) == set(want) and all(np.abs(got[k] - want[k]).max() < 1e-6 for k in want)


@pytest.mark.matrix
@pytest.mark.parametrize("consumer", READERS)
@pytest.mark.parametrize("name", PORTABLE)
def test_portable_is_read_alike(
    name: str, consumer: str, model: Model, adapters: Any, tmp_path: Path
) -> None:
    adapter = adapters[name]
    options: Any = {"profile": "portable", "params": model.params}
    peft.save(tmp_path / "a", model.names, adapter, base="b", **options)
    got, want = READERS[consumer](tmp_path / "a"), wanted(model, adapter)
    for module in got.keys() | want.keys():  # a module with an update of zero is right too
        np.testing.assert_allclose(
            got[module], want.get(module, 0 * got[module]), atol=1e-6, err_msg=module
        )
    said = peft.check(tmp_path / "a", consumer)
    before = [
        x for x in peft.check(adapter, consumer, model.names, **options) if "base_model" not in x
    ]
    assert before == list(said)
    assert all(text.startswith("needs") for text in said)


@pytest.mark.matrix
@pytest.mark.parametrize("consumer", READERS)
@pytest.mark.parametrize("name", SPECS)
def test_what_is_not_read_right_is_said_before(
    name: str, consumer: str, model: Model, adapters: Any, tmp_path: Path
) -> None:
    adapter = adapters[name]
    peft.save(tmp_path / "a", model.names, adapter, base="b", params=model.params)
    try:
        right = name not in ("dora",) and agrees(
            READERS[consumer](tmp_path / "a"), wanted(model, adapter)
        )
    except RefusedError:
        right = False
    said = peft.check(adapter, consumer, model.names, params=model.params)
    bad = [text for text in said if not text.startswith("needs")]
    assert (bad == []) == right or "needs --lora-target-modules" in "".join(said)


@pytest.mark.parametrize("name", ["dora", "embedding"])
def test_what_is_not_portable_is_refused(
    name: str, model: Model, adapters: Any, tmp_path: Path
) -> None:
    refused = r"(?s)unlike 'faithful', cannot carry.*model\."
    with pytest.raises(lora_jax.LoraError, match=refused):
        peft.save(tmp_path / "a", model.names, adapters[name], base="b", profile="portable")
    assert not (tmp_path / "a").exists()


def test_what_is_printed(model: Model, adapters: Any, tmp_path: Path) -> None:
    saved = peft.save(tmp_path / "a", model.names, adapters["mixed"], base="b")
    text = str(saved)
    assert saved.rank == 4 and "vLLM needs --max-lora-rank 8" in text
    said = "misreads rank_pattern and alpha_pattern"
    (line,) = (line for line in text.splitlines() if said in line)  # one line for all consumers
    assert {"vllm", "sglang"} <= set(line.split(":")[0].split(", "))
    with pytest.raises(lora_jax.LoraError, match=r"no rules of 'tgi'.*vllm"):
        peft.check(saved.folder, "tgi")


def test_the_largest_rank_without_one() -> None:
    """A rank that is missing or null is PEFT's default, 8."""
    assert consumers.largest_rank({}) == consumers.largest_rank({"r": None}) == 8
    assert consumers.largest_rank({"r": None, "rank_pattern": {"q": 9}}) == 9
