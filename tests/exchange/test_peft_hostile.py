"""A stranger's folder gives an error with the file and the key, and never other numbers."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.exchange import peft, tensor_file
from tests.exchange.tiny import Model

Q, V = "base_model.model.q", "base_model.model.v"
NAMES = {"q": "q", "v": "v", "bias": "v.bias"}


def model() -> Model:
    def f(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["q"]) @ p["v"] + p["bias"][None]

    params = {"q": jnp.ones((6, 5)), "v": jnp.ones((5, 4)), "bias": jnp.zeros(4)}
    return Model(f, params, NAMES, jnp.ones((2, 6)))


MODEL = model()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `save` wrote."""
    folder = tmp_path_factory.mktemp("good") / "adapter"
    layout = lora_jax.resolve(lora_jax.LoraSpec(2, 3.0, "{q,v}"), MODEL.f, MODEL.params, MODEL.x)
    adapters = jax.tree.map(jnp.ones_like, lora_jax.init(jax.random.key(0), layout))
    peft.save(folder, NAMES, lora_jax.Adapter(layout, adapters), base="org/name")
    return folder


def load(folder: Path, **options: Any) -> lora_jax.Adapter:
    return peft.load(folder, NAMES, MODEL.f, MODEL.params, MODEL.x, **options)


def rewritten(
    good: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any], dict[str, np.ndarray]], None],
) -> Path:
    """Copy a folder with other settings and tensors, and without hashes, as PEFT writes it."""
    settings = json.loads((good / peft.CONFIG).read_text())
    tensors = dict(tensor_file.read(good / peft.TENSORS).tensors)
    change(settings, tensors)
    folder = tmp_path / "changed"
    folder.mkdir()
    (folder / peft.CONFIG).write_text(json.dumps(settings))
    tensor_file.write(folder / peft.TENSORS, tensors, {"format": "pt"})
    return folder


def setting(key: str, value: Any) -> Callable[[Any, Any], None]:
    return lambda settings, tensors: settings.update({key: value})


def tensor(key: str, value: Any) -> Callable[[Any, Any], None]:
    array = None if value is None else np.asarray(value, np.float32)
    return lambda _, x: x.pop(key) if array is None else x.update({key: array})


def renamed(old: str, new: str) -> Callable[[Any, Any], None]:
    return lambda settings, tensors: tensors.update({new: tensors.pop(old)})


def moved(old: str, new: str) -> Callable[[Any, Any], None]:
    def change(settings: Any, tensors: Any) -> None:
        settings["target_modules"] = [new.rpartition(".")[2], "v"]
        for key in [key for key in tensors if key.startswith(old)]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return change


TENSORS = peft.TENSORS
Z = (TENSORS, "has no")
NAN = np.full((2, 6), np.nan)
WRONG = {
    "a wrong shape": (tensor(f"{Q}.lora_A.weight", np.ones((2, 7))), TENSORS, "q"),
    "factors of two ranks": (tensor(f"{Q}.lora_A.weight", np.ones((3, 6))), TENSORS, Q),
    "an axis too many": (tensor(f"{Q}.lora_A.weight", np.ones((2, 6, 1))), TENSORS, Q),
    "no rank": (tensor(f"{Q}.lora_A.weight", np.ones((0, 6))), TENSORS, Q),
    "a missing half": (tensor(f"{Q}.lora_B.weight", None), TENSORS, Q),
    "NaN": (tensor(f"{Q}.lora_A.weight", NAN), TENSORS, f"{Q}.lora_A.weight"),
    "infinity": (tensor(f"{Q}.lora_A.weight", NAN + np.inf), TENSORS, f"{Q}.lora_A.weight"),
    "a module without its other half": (renamed(f"{Q}.lora_A.weight", f"{Q}q.lora_A.weight"), *Z),
    "an unknown module": (moved(Q, "base_model.model.z"), TENSORS, "no 'z.weight'"),
    "an unknown tensor": (tensor("base_model.model.q.lora_C.weight", [1.0]), TENSORS, "lora_C"),
    "the adapter's name": (
        renamed(f"{Q}.lora_A.weight", f"{Q}.lora_A.default.weight"),
        TENSORS,
        "lora_A.default.weight",
    ),
    "a way out": (tensor("base_model.model.../../q", [1.0]), TENSORS, r"\.\./\.\./q"),
    "a long name": (tensor(f"{'a.' * 10**6}lora_A.weight", [1.0]), TENSORS, "a.a."),
    "too many parameters": (setting("target_parameters", ["q"] * 3 * 10**6), TENSORS, "too many"),
    "a weight beside factors": (tensor(f"{Q}.weight", np.ones((5, 6))), TENSORS, "base_layer"),
    "a magnitude unasked": (tensor(f"{Q}.lora_magnitude_vector", np.ones(5)), TENSORS, "use_dora"),
    "a rank of 10^12": (setting("r", 10**12), TENSORS, f"{Q}.*1000000000000"),
    "another rank": (setting("r", 4), TENSORS, Q),
    "a rank of zero": (setting("r", 0), peft.CONFIG, "r is 0"),
    "DoRA without lengths": (setting("use_dora", True), TENSORS, "use_dora"),
    "a module not targeted": (setting("target_modules", ["v"]), TENSORS, "target_modules"),
    "an unknown setting": (setting("use_magic", True), peft.CONFIG, "use_magic"),
    "another method": (setting("peft_type", "LN_TUNING"), peft.CONFIG, "LN_TUNING.*LORA, LOHA"),
    "tensors of another method": (setting("peft_type", "LOHA"), TENSORS, "hada_w1_a is not"),
    "a projection unasked": (tensor("base_model.vera_A", np.ones((2, 6))), TENSORS, "vera_A"),
    "alpha in words": (setting("lora_alpha", "8"), peft.CONFIG, "lora_alpha"),
    "a slow pattern": (setting("target_modules", "(?:|){60}Z"), TENSORS, "target_modules.*2 s"),
    "no pattern": (setting("rank_pattern", {"(": 2}), TENSORS, "not a pattern"),
    "PiSSA": (setting("init_lora_weights", "pissa_niter_4"), peft.CONFIG, "path_initial_model"),
    "trained tokens unsaid": (
        tensor("base_model.model.q.token_adapter.trainable_tokens_delta", np.ones((1, 5))),
        TENSORS,
        "trainable_token_indices",
    ),
    **{
        key: (setting(key, value), peft.CONFIG, key)
        for key, value in {
            "alora_invocation_tokens": [-1], "arrow_config": {"n": 3}, "kasa_config": {"n": 1},
            "layer_replication": [[0, 2], [1, 3]], "monteclora_config": {"n": 1},
            "use_bdlora": {"nblocks": 2}, "use_qalora": True,
        }.items()
    },
}  # fmt: skip


@pytest.mark.few(18)
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str, good: Path, tmp_path: Path) -> None:
    change, file, key = WRONG[name]
    start = time.monotonic()
    with pytest.raises(lora_jax.LoraError, match=rf"(?s){file}.*{key}"):
        load(rewritten(good, tmp_path, change))
    assert time.monotonic() - start < 20


def test_what_is_not_wrong(good: Path, tmp_path: Path) -> None:
    def bare(settings: Any, tensors: Any) -> None:
        settings.update({"a_newer_setting": None, "layer_replication": None, "lora_dropout": 0.1})
        for key in list(tensors):
            tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)

    assert_same(load(good), load(rewritten(good, tmp_path, bare)))


def assert_same(one: lora_jax.Adapter, two: lora_jax.Adapter) -> None:
    assert one.layout == two.layout and not one.trainable and not two.trainable
    jax.tree.map(np.testing.assert_array_equal, one.parameters, two.parameters)


def header(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(folder: Path, text: bytes, body: bytes, length: int | None = None) -> None:
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / peft.TENSORS).write_bytes(size + text + body)


def entry(**changes: Any) -> Callable[[dict[str, Any]], bytes]:
    def change(found: dict[str, Any]) -> bytes:
        found[f"{Q}.lora_A.weight"].update(changes)
        return json.dumps(found).encode()

    return change


def twice(found: dict[str, Any]) -> bytes:
    text = json.dumps(found)
    key = f'"{Q}.lora_A.weight": '
    return text.replace(key, f"{key}{{}}, {key}", 1).encode()


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    "a size of 10^12": (entry(shape=[10**12, 6]), Q),
    "an overflow": (entry(shape=[2**62, 2**62, 16]), Q),
    "a negative size": (entry(shape=[-2, -6]), Q),
    "a place outside": (entry(data_offsets=[10**12, 10**12 + 48]), Q),
    "a place backwards": (entry(data_offsets=[48, 0]), Q),
    "another's place": (entry(data_offsets=[8, 56]), "."),
    "too many arrays": (
        lambda found: json.dumps(dict.fromkeys(map(str, range(10**5 + 1)), 1)).encode(),
        "100,000 arrays",
    ),
    "integers": (entry(dtype="I32"), f"{Q}.lora_A.weight is stored as I32"),
    "a dtype of numbers": (entry(dtype=[1]), Q),
    "a key twice": (twice, f"{Q}.lora_A.weight' is there twice"),
    "no JSON": (lambda found: b"{" * 50, "is not JSON"),
    "a deep JSON": (lambda found: b"[" * 100_000, "nested too deeply|is not JSON"),
    "not finite": (lambda found: b'{"a": NaN}', "NaN"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name: str, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "a")
    change, key = HEADERS[name]
    found, body = header(folder / peft.TENSORS)
    with_header(folder, change(found), body)
    with pytest.raises(lora_jax.LoraError, match=rf"(?s){peft.TENSORS}.*({key})"):
        load(folder)


@pytest.mark.parametrize("length", [2**63, 10**12, 2**26 + 1])
def test_a_header_longer_than_the_file(length: int, good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "a")
    with_header(folder, b"{}", b"", length)
    with pytest.raises(lora_jax.LoraError, match=rf"{peft.TENSORS} declares a header"):
        load(folder)
    (folder / peft.TENSORS).write_bytes(b"PK")
    with pytest.raises(lora_jax.LoraError, match=rf"{peft.TENSORS} has 2 bytes"):
        load(folder)


def test_a_setting_twice(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "a")
    text = (folder / peft.CONFIG).read_text()
    (folder / peft.CONFIG).write_text(text.replace("{", '{"r": 2,', 1))
    with pytest.raises(lora_jax.LoraError, match=rf"{peft.CONFIG}.*'r' is there twice"):
        load(folder)


def test_a_pickle_is_not_opened(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "a")
    (folder / peft.TENSORS).rename(folder / peft.PICKLE)
    with pytest.raises(lora_jax.LoraError, match=r"(?s)adapter_model.bin is a pickle.*save_file"):
        load(folder)


def test_several_adapters_have_to_be_chosen_from(good: Path, tmp_path: Path) -> None:
    shutil.copytree(good, tmp_path / "one")
    assert_same(load(tmp_path), load(good))
    shutil.copytree(good, tmp_path / "two")
    with pytest.raises(lora_jax.LoraError, match=r"(?s)2 adapters in sub-folders.*one.*two"):
        load(tmp_path)
    with pytest.raises(lora_jax.LoraError, match="no folder"):
        load(tmp_path / "three")


def test_a_changed_setting_is_found_or_meant(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good, tmp_path / "a")
    settings = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps(settings | {"base_model_name_or_path": "x"}))
    assert_same(load(folder), load(good))
    (folder / peft.CONFIG).write_text(json.dumps(settings | {"lora_alpha": 30}))
    with pytest.raises(lora_jax.LoraError, match=r"adapter_config.json.*verify=False"):
        load(folder)
    assert load(folder, verify=False).layout["q"].alpha == 30


def flipped(source: Path, folder: Path, file: str, draw: np.random.Generator) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True)
    data = bytearray((source / file).read_bytes())
    data[draw.integers(len(data))] ^= 1 << int(draw.integers(8))
    (folder / file).write_bytes(bytes(data))


@pytest.mark.parametrize("file", [peft.TENSORS, peft.CONFIG])
def test_flipped_bits_are_found(file: str, good: Path, tmp_path: Path) -> None:
    """Each of 200 flipped bits gives an error with the file's name, or the same adapter."""
    want, draw, messages = load(good), np.random.default_rng(0), []
    for _ in range(200):
        flipped(good, tmp_path / "a", file, draw)
        try:
            got = load(tmp_path / "a")
        except lora_jax.LoraError as error:
            messages.append(str(error))
        else:
            assert_same(got, want)
    assert all(file in text for text in messages)
    assert len(messages) > (190 if file == peft.TENSORS else 80)


def test_nothing_is_written_outside_the_folder(good: Path, tmp_path: Path) -> None:
    adapter = load(good)
    names = {"q": "../../q", "v": "v"}
    peft.save(tmp_path / "in" / "a", names, adapter, base="../../etc")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert sorted(p.name for p in (tmp_path / "in" / "a").iterdir()) == [peft.CONFIG, peft.TENSORS]
