"""docs/own_model.md: every block runs, and its PEFT folder can be read by PEFT's own rules.

The PEFT folder of each section is read here with NumPy alone, and merged into the base weights by
hand. The result equals the weights of `merge`, and for Llamas the logits of another implementation.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import shutil
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax
from lora_jax import models
from lora_jax.exchange import peft
from tests import laws
from tests.docs import pages
from tests.foreign.register import without_init
from tests.test_transform import assert_close

pytestmark = pytest.mark.filterwarnings("default")  # other people's warnings

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/golden_models/llama"
Arrays = dict[str, np.ndarray]


class Ran(NamedTuple):
    """The results of a section: the function and its arguments, the layout and the names."""

    f: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    layout: lora_jax.Layout
    names: Any
    page: dict[str, Any]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A Llama that every package can be: plain rotations, with the only theta of Tunix 0.1.7."""
    folder = tmp_path_factory.mktemp("page") / "llama"
    folder.mkdir()
    config = json.loads((GOLDEN / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "model.safetensors", folder)
    return folder


@pytest.fixture
def run(
    llama: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Ran]:
    """Run the first block of the page and the blocks of one section, in a folder with `llama`."""

    def section(title: str) -> Ran:
        (tmp_path / "llama").symlink_to(llama)
        monkeypatch.chdir(tmp_path)
        calls, named = [], []
        lora, save = pages.run("own_model", [""])["lora"], peft.save
        watched = lambda *call: (calls.append(call), lora(*call))[1]  # noqa: E731
        monkeypatch.setattr(peft, "save", lambda *a, **k: (named.append(a[1]), save(*a, **k))[1])
        page = pages.run("own_model", ["", title], {"lora": watched})
        monkeypatch.undo()
        ((f, params, *args),), (names,) = calls, named
        return Ran(f, params, tuple(args), page["layout"], names, page)

    return section


def saved(ran: Ran, folder: pathlib.Path) -> tuple[Any, Arrays]:
    """Save random adapters of the section, and return them with the updates that a reader finds."""
    draw = np.random.default_rng(3).standard_normal
    shapes = jax.eval_shape(lambda: lora_jax.init(jax.random.key(0), ran.layout))
    adapters = jax.tree.map(lambda x: (0.3 * draw(x.shape)).astype(x.dtype), shapes)
    peft.save(folder, ran.names, (ran.layout, adapters), base="org/name")
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert not settings["rank_pattern"] and not settings["alpha_pattern"]
    found = {}
    for key in [k for k in tensors if k.endswith(".lora_B.weight")]:
        b, a = tensors.pop(key), tensors.pop(key.replace("lora_B", "lora_A"))
        module = key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        scale = settings["lora_alpha"] / settings["r"]
        found[module] = scale * np.tensordot(b.reshape(len(b), -1), a, 1)
    assert not tensors
    return adapters, found


# --- weights, put together by hand ---------------------------------------------------------------

MLP = ("up", "down")
QKV = ("query", "key", "value")


def bare(w: Arrays, d: Arrays) -> None:
    for i in range(2):
        for n in MLP:
            w[f"layers/{i}/{n}"] += d.pop(f"model.layers.{i}.mlp.{n}_proj").T


def linen(w: Arrays, d: Arrays) -> None:
    for n in MLP:
        w[f"{n}/kernel"] += d.pop(f"encoder.{n}").T


def nnx(w: Arrays, d: Arrays) -> None:
    for n in QKV:
        w[f"attend/{n}/kernel"] += d.pop(f"layers.0.self_attn.{n}_proj").T.reshape(8, 2, 4)
    w["attend/out/kernel"] += d.pop("layers.0.self_attn.o_proj").T.reshape(2, 4, 8)


def maxtext(w: Arrays, d: Arrays) -> None:
    for i in range(3):
        q, o = (d.pop(f"model.layers.{i}.self_attn.{n}_proj").T for n in "qo")
        w["params/layers/query/kernel"][:, i] += q.reshape(8, 2, 4)
        w["params/layers/out/kernel"][:, i] += o.reshape(2, 4, 8)


def equinox(w: Arrays, d: Arrays) -> None:
    w["layers/0/weight"] += d.pop("encoder.up")
    w["layers/2/weight"] += d.pop("encoder.down")


def keras(w: Arrays, d: Arrays) -> None:
    w["conv/kernel"] += d.pop("features.conv").transpose(2, 3, 1, 0)
    w["dense/kernel"] += d.pop("classifier.dense").T


BY_HAND: dict[str, tuple[tuple[str, ...], Callable[[Arrays, Arrays], None]]] = {
    "Bare JAX": ((), bare),
    "Linen": ((), linen),
    "NNX": ((), nnx),
    "MaxText: layers on axis 1": ((), maxtext),
    "Equinox with state": (("equinox",), equinox),
    "Keras": (("keras",), keras),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("title", BY_HAND)
def test_the_folder_holds_the_merged_weights(
    title: str, run: Callable[[str], Ran], tmp_path: pathlib.Path
) -> None:
    packages, put = BY_HAND[title]
    for package in packages:
        pytest.importorskip(package)
    ran = run(title)
    adapters, deltas = saved(ran, tmp_path / "drawn")
    want = {p: np.array(x) for p, x in lora_jax.paths.flatten(ran.params).items()}
    put(want, deltas)
    assert not deltas
    merged = lora_jax.merge(ran.layout, ran.params, adapters)
    got = lora_jax.paths.flatten(merged)
    for path, w in want.items():
        np.testing.assert_allclose(got[path], w, atol=2e-6, err_msg=path)
    fast = jax.jit(lora_jax.adapt(ran.layout, ran.f))(ran.params, adapters, *ran.args)
    assert_close(floats(fast), floats(jax.jit(ran.f)(merged, *ran.args)), 2e-5)
    again = peft.load(tmp_path / "drawn", ran.names, ran.f, ran.params, *ran.args)
    back = lora_jax.merge(again.layout, ran.params, again.parameters)
    assert_close(lora_jax.paths.flatten(back), got, 1e-6)


# --- Llamas --------------------------------------------------------------------------------------


def from_folder(ran: Ran, llama: pathlib.Path) -> Arrays:
    return safetensors.numpy.load_file(llama / "model.safetensors")


def from_penzai(ran: Ran, _: pathlib.Path) -> Arrays:
    """Hugging Face's tensors of a Penzai model, found by the names of its axes."""
    heads, emb = ("head_groups", "query_heads", "projection"), "embedding"
    orders = {
        "attention/query": ("self_attn.q_proj", *heads, emb),
        "attention/key": ("self_attn.k_proj", heads[0], heads[2], emb),
        "attention/value": ("self_attn.v_proj", heads[0], heads[2], emb),
        "attention/output": ("self_attn.o_proj", emb, *heads),
        "mlp/gating_linear": ("mlp.gate_proj", "neurons", emb),
        "mlp/value_linear": ("mlp.up_proj", "neurons", emb),
        "mlp/out_linear": ("mlp.down_proj", emb, "neurons"),
        "pre_attention_norm/scale": ("input_layernorm", emb),
        "pre_ffw_norm/scale": ("post_attention_layernorm", emb),
    }

    def positional(label: str, *axes: str) -> np.ndarray:
        return np.asarray(ran.params[f"transformer/{label}"].unwrap(*axes))

    found = {
        "model.embed_tokens.weight": positional("embedder.embeddings", "vocabulary", emb),
        "model.norm.weight": positional("final_norm/scale.weights", emb),
        "lm_head.weight": positional("lm_head.weights", "vocabulary", emb),
    }
    for label, (module, *axes) in orders.items():
        for i, w in enumerate(positional(f"blocks/{label}.weights", "blocks", *axes)):
            flat = {2: (16, -1), 1: (-1,)}[min(len(axes), 2)] if axes[0] == emb else (-1, 16)
            found[f"model.layers.{i}.{module}.weight"] = w.reshape(flat)
    return found


def penzai_of(llama: pathlib.Path) -> dict[str, Any]:
    """The folder's parameters, converted by Penzai's own converter: [out, in], with heads."""
    common = importlib.import_module("penzai.models.transformer.variants.llamalike_common")
    config = json.loads((llama / "config.json").read_text()) | {"rope_theta": 1e6}
    tensors = safetensors.numpy.load_file(llama / "model.safetensors")
    stored = types.SimpleNamespace(
        config=types.SimpleNamespace(**config),
        dtype="torch.float32",
        state_dict=lambda: tensors,
    )
    model = common.llamalike_from_huggingface_model(stored, use_layer_stack=True)
    pz = importlib.import_module("penzai.pz")
    return {v.label: v.value for v in pz.unbind_params(model, freeze=True)[1]}


LLAMAS: dict[str, tuple[str, Callable[[Ran, pathlib.Path], Arrays]]] = {
    "Equinox": ("eqx_zoo", from_folder),
    "Tunix": ("tunix", from_folder),
    "Penzai": ("penzai", from_penzai),
    "Penzai from a folder": ("penzai", from_folder),
}


def floats(out: Any) -> list[Any]:
    """The outputs and the new state, without the seeds."""
    return [x for x in jax.tree.leaves(out) if laws.is_float(x)]


def first_logits(out: Any) -> np.ndarray:
    """The logits of one sequence, from a model's outputs."""
    return np.asarray(jax.tree.leaves(out)[0]).reshape(7, 23)


@pytest.mark.parametrize("title", LLAMAS)
def test_the_folder_is_the_same_adapter_on_another_llama(
    title: str, run: Callable[[str], Ran], llama: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Base and adapter give the foreign model's logits in our Llama, as Hugging Face's tensors."""
    package, tensors_of = LLAMAS[title]
    if package == "tunix":
        without_init("tunix")
    else:
        pytest.importorskip(package)
    ran = run(title.removesuffix(" from a folder"))
    if title == "Penzai from a folder":  # the same names for arrays in another order
        params = penzai_of(llama)
        layout, _, ran.page["adapted"] = ran.page["lora"](ran.f, params, *ran.args)
        ran = ran._replace(params=params, layout=layout)
    adapters, deltas = saved(ran, tmp_path / "drawn")
    assert len(deltas) == 2 * 7
    base = tensors_of(ran, llama)
    merged = {k: x + deltas.pop(k.removesuffix(".weight"), np.float32(0)) for k, x in base.items()}
    assert not deltas
    source = models.open(str(llama))
    ids = jnp.arange(7)[None]
    for tensors, out in (
        (base, jax.jit(ran.f)(ran.params, *ran.args)),
        (merged, ran.page["adapted"](ran.params, adapters, *ran.args)),
    ):
        folder = tmp_path / f"llama{len(list(tmp_path.iterdir()))}"
        shutil.copytree(llama, folder)
        safetensors.numpy.save_file(
            {k: np.ascontiguousarray(x) for k, x in tensors.items()}, folder / "model.safetensors"
        )
        params = models.open(str(folder)).load(source.config)
        want = models.DecoderModel(source.config).apply({"params": params}, ids)
        assert_close(first_logits(out), first_logits(want), 2e-5)
    again = peft.load(tmp_path / "drawn", ran.names, ran.f, ran.params, *ran.args)
    assert_close(
        lora_jax.merge(again.layout, ran.params, again.parameters),
        lora_jax.merge(ran.layout, ran.params, adapters),
        1e-6,
    )


def test_every_section_is_tested() -> None:
    assert {*BY_HAND, *LLAMAS} - {"Penzai from a folder"} == set(pages.sections("own_model")[1:])
