"""loralib's state dicts, compared with its arithmetic, which is written here as it describes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.exchange import loralib, tensor_file
from lora_jax.models.hf_module import HfModule, HfNames
from tests.exchange.tiny import Model, conv, flat, merged

ALPHA = 3.0


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The update [out, in] of a Linear."""
    return ALPHA / len(a) * b @ a


def merged_linear(a: np.ndarray, b: np.ndarray, enabled: Sequence[bool]) -> np.ndarray:
    """The update [out, in] of a MergedLinear: a convolution in groups, padded with zeros."""
    groups, rank = sum(enabled), b.shape[1]
    size = len(b) // groups
    delta = np.zeros((size * len(enabled), a.shape[1]), np.float32)
    group = 0
    for part, on in enumerate(enabled):
        if on:
            inputs = a[group * rank : (group + 1) * rank]
            rows = b[group * size : (group + 1) * size]
            delta[part * size : (part + 1) * size] = ALPHA / rank * rows @ inputs
            group += 1
    return delta


def scanned(p: Any, x: Any) -> Any:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w).reshape(2, 3, 6).sum(1), None), x, p["qkv"])[
        0
    ]


def unrolled(p: Any, x: Any) -> Any:
    for w in (p["qkv0"], p["qkv1"]):
        x = jnp.tanh(jnp.einsum("bi,oi->bo", x, w)).reshape(2, 3, 6).sum(1)
    return x


NAMES: HfNames = {"qkv": HfModule("h.{layer}.attn.c_attn", transposed=True)}
OWN: HfNames = {f"qkv{i}": HfModule(f"h.{i}.attn.c_attn", transposed=False) for i in range(2)}
X = jnp.ones((2, 6))


@pytest.mark.parametrize("enabled", [(True, False, True), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("form", ["scanned", "unrolled"])
def test_merged_linear(form: str, enabled: tuple[bool, ...]) -> None:
    n = sum(enabled)
    state = {}
    for i in range(2):
        state[f"h.{i}.attn.c_attn.lora_A"] = draw(2 * n, 6) + i
        state[f"h.{i}.attn.c_attn.lora_B"] = draw(6 * n, 2) - i
    w = draw(2, 18, 6)
    if form == "scanned":
        model = Model(scanned, {"qkv": jnp.asarray(w.swapaxes(1, 2))}, NAMES, X)
    else:
        model = Model(unrolled, {f"qkv{i}": jnp.asarray(w[i]) for i in range(2)}, OWN, X)
    adapter = loralib.load(
        state, model.names, model.f, model.params, X, alpha=ALPHA, enable_lora={"*.c_attn": enabled}
    )
    got = merged(model, adapter)
    for i in range(2):
        delta = merged_linear(
            state[f"h.{i}.attn.c_attn.lora_A"], state[f"h.{i}.attn.c_attn.lora_B"], enabled
        )
        value = got["qkv"][i].T if form == "scanned" else got[f"qkv{i}"]
        np.testing.assert_allclose(value, w[i] + delta, atol=2e-6)
    target = adapter.layout.targets[0]
    assert target.rank == 2  # not the sum: each part has factors of its own
    assert target.parts == tuple((6 * i, 6) for i, on in enumerate(enabled) if on)


def test_parts_of_an_output_in_heads() -> None:
    """If the parts are not slices of one axis, the update is the same and its rank is their sum."""

    def f(p: Any, x: Any) -> Any:
        return jnp.tanh(jnp.einsum("bi,ihk->bhk", x, p["qkv"]))

    w, a, b = draw(6, 6, 3), draw(4, 6), draw(12, 2)
    model = Model(f, {"qkv": jnp.asarray(w)}, {"qkv": "c_attn"}, X)
    state = {"c_attn.lora_A": a, "c_attn.lora_B": b}
    enable = {"c_attn": (True, False, True)}
    adapter = loralib.load(state, model.names, f, model.params, X, alpha=ALPHA, enable_lora=enable)
    delta = merged_linear(a, b, enable["c_attn"]).T.reshape(w.shape)
    np.testing.assert_allclose(merged(model, adapter)["qkv"], w + delta, atol=2e-6)


def picture(p: Any, ids: Any) -> Any:
    x = p["table"][ids]  # [b, t, 4]
    x = conv(x[:, None], p["conv"]["kernel"], ("NCHW", "HWIO", "NCHW"))
    return jnp.tanh(x).reshape(len(x), -1) @ p["out"]["kernel"] + p["out"]["bias"][None]


def layers() -> Model:
    params = {
        "table": draw(9, 4),
        "conv": {"kernel": draw(2, 2, 1, 3)},
        "out": {"kernel": draw(18, 5), "bias": draw(5)},
    }
    names: HfNames = {
        "table": HfModule("wte", layer="embedding"),
        "conv/kernel": HfModule("conv", layer="conv"),
        "out/kernel": "out",
        "out/bias": "out.bias",
    }
    return Model(picture, jax.tree.map(jnp.asarray, params), names, jnp.ones((2, 3), jnp.int32))


def state() -> dict[str, np.ndarray]:
    return {
        "wte.lora_A": draw(2, 9), "wte.lora_B": draw(4, 2),
        "conv.lora_A": draw(4, 2), "conv.lora_B": draw(6, 4),  # rank 2, window 2
        "out.lora_A": draw(2, 18), "out.lora_B": draw(5, 2), "out.bias": draw(5) + 1,
    }  # fmt: skip


@pytest.mark.parametrize("in_a_file", [False, True])
def test_linear_embedding_and_convolution(in_a_file: bool, tmp_path: Path) -> None:
    model, s = layers(), state()
    source: Any = s
    if in_a_file:
        source = tmp_path / "lora.safetensors"
        tensor_file.write(source, s, {})
    adapter = loralib.load(source, model.names, model.f, model.params, model.x, alpha=ALPHA)
    got, w = merged(model, adapter), flat(model.params)
    table = product(s["wte.lora_A"], s["wte.lora_B"]).T
    np.testing.assert_allclose(got["table"], w["table"] + table, atol=2e-6)
    kernel = (ALPHA / 2 * s["conv.lora_B"] @ s["conv.lora_A"]).reshape(3, 1, 2, 2)
    kernel = kernel.transpose(2, 3, 1, 0)
    np.testing.assert_allclose(got["conv/kernel"], w["conv/kernel"] + kernel, atol=2e-6)
    out = product(s["out.lora_A"], s["out.lora_B"]).T
    np.testing.assert_allclose(got["out/kernel"], w["out/kernel"] + out, atol=2e-6)
    np.testing.assert_array_equal(got["out/bias"], s["out.bias"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("out.lora_B"), "out.lora_A is there, and out.lora_B is not"),
        (lambda s: s.update({"out.lora_B": draw(10, 1)}), "'out' has lora_A.*name it in enable_l"),
        (lambda s: s.update({"out.lora_A": draw(2, 17)}), "has 18 inputs, the file 17"),
        (lambda s: s.update({"out.lora_B": draw(6, 2)}), "'out' has 6 outputs"),
        (lambda s: s.update({"out.lora_B": draw(5, 2) * np.nan}), "out.lora_B holds numbers that"),
        (
            lambda s: s.update({"out.lora_B": np.full((5, 2), 1e300)}),
            "out.lora_B holds numbers that",
        ),
        (lambda s: s.update({"out.weight": draw(5, 18)}), "out.weight: expected <module>.lora_A"),
        (lambda s: s.update({"conv.lora_B": draw(7, 4)}), "'conv': .* are not a Conv2d of window"),
        (lambda s: s.update({"odd.lora_A": draw(2, 3), "odd.lora_B": draw(3, 2)}), "no 'odd.weig"),
        (
            lambda s: s.update({"merged.lora_A": draw(3, 6), "merged.lora_B": draw(6, 2)}),
            "enable_l",
        ),
    ],
)
def test_hostile(change: Any, says: str, tmp_path: Path) -> None:
    model, s = layers(), state()
    change(s)
    file = tmp_path / "bad.safetensors"
    tensor_file.write(file, s, {})
    with pytest.raises(lora_jax.LoraError, match=rf"bad\.safetensors: (?s:.*){says}"):
        loralib.load(
            file, model.names, model.f, model.params, model.x, alpha=ALPHA,
            enable_lora={"merged": (True, False, True)},
        )  # fmt: skip


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    model = layers()
    (tmp_path / "lora.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(lora_jax.LoraError, match=r"lora\.pt is a pickle(?s:.*)weights_only=True"):
        loralib.load(tmp_path / "lora.pt", None, model.f, model.params, model.x, alpha=ALPHA)
