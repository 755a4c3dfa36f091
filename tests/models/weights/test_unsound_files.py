"""Damaged or forged weight files are refused; the message has the file, its value and the limit."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import models
from lora_jax.errors import WeightsError
from lora_jax.models.weights import gguf_header
from lora_jax.system import safetensors_reader

Folder = Callable[[str], Path]

# ---- safetensors -----------------------------------------------------------------------------


def _file(path: Path, header: Any, data: bytes = bytes(64), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _one(shape: Any, place: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": place}}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({}, 10 * 2**30),
        ({}, 2**64 - 1),
        (b"{not json", None),
        (b"[" * 100_000, None),
        (b"\xff\xfe{}", None),
        ([], None),
        ({"w": 3}, None),
        (_one([4, 4], [0, 64], "F99"), None),
        (_one([2**40, 2**40], [0, 64]), None),
        (_one([-4, -4], [0, 64]), None),
        (_one([100, 100, 100], [0, 64]), None),
        (_one([16], [64, 0]), None),
        (_one([20], [0, 80]), None),
        ({"a": _one([16], [0, 64])["w"], "b": _one([16], [0, 64])["w"]}, None),
        ({"x" * 1_000_000: 3}, None),
    ],
)
def test_header_of_safetensors(tmp_path: Path, header: Any, length: int | None) -> None:
    path = _file(tmp_path / "model.safetensors", header, length=length)
    with pytest.raises(models.WeightsError, match=r"model\.safetensors") as failure:
        safetensors_reader.read(path, WeightsError)
    assert len(str(failure.value)) < 1000


def test_short_files(tmp_path: Path) -> None:
    for data in (b"", b"abc"):
        (tmp_path / "model").write_bytes(data)
        with pytest.raises(models.WeightsError, match="too few"):
            safetensors_reader.read(tmp_path / "model", WeightsError)


def test_slices_of_every_float(tmp_path: Path) -> None:
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
    assert set(kinds) == set(safetensors_reader.FLOATS)
    tensors = {name: np.arange(12).reshape(3, 4).astype(kind) for name, kind in kinds.items()}
    safetensors.numpy.save_file(
        {**tensors, "none": np.zeros((0, 4), np.float32)}, tmp_path / "model"
    )
    found = safetensors_reader.read(tmp_path / "model", WeightsError).tensors
    assert found["none"].part((slice(0, 0), slice(0, 4))).shape == (0, 4)
    for name, value in tensors.items():
        assert (found[name].shape, found[name].dtype) == ((3, 4), name)
        part = found[name].part((slice(1, 3), slice(0, 2)))
        np.testing.assert_array_equal(part, value[1:3, :2])
        assert part.dtype == value.dtype


def test_cut_file_of_a_model(folder: Folder) -> None:
    path = folder("llama")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(models.WeightsError, match=r"llama/model\.safetensors"):
        models.open(str(path)).load()


def test_integers_are_not_taken_for_weights(folder: Folder) -> None:
    path = folder("llama")
    file = path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "model.norm.weight"
    safetensors.numpy.save_file(tensors | {name: tensors[name].astype(np.int8)}, file)
    with pytest.raises(models.WeightsError, match=r"model\.norm\.weight is stored as I8"):
        models.open(str(path)).load()


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "..", "", 3])
def test_index_names_files_of_its_own_folder(folder: Folder, file: Any) -> None:
    path = folder("bert")
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(models.WeightsError, match=r"index\.json: w is in .* in the same folder"):
        models.open(str(path)).load()
    index.write_text("{}")
    with pytest.raises(models.WeightsError, match="weight_map is NoneType"):
        models.open(str(path)).load()


def test_tensor_in_two_files(folder: Folder) -> None:
    path = folder("bert")
    first, second = sorted(path.glob("*.safetensors"))
    both = safetensors.numpy.load_file(first) | safetensors.numpy.load_file(second)
    safetensors.numpy.save_file(both, second)
    with pytest.raises(models.WeightsError, match=r"is in .*-00001-of.* and in .*-00002-of"):
        models.open(str(path)).load()


def test_more_layers_than_tensors(data: Path) -> None:
    """A thousand million layers are an error before a list of their names is made."""
    model = models.open(str(data / "golden_models" / "llama"))
    config = dataclasses.replace(model.config, num_layers=10**9)
    with pytest.raises(models.WeightsError, match="too few for 1000000000 layers"):
        model.load(config)


# ---- GGUF ------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _gguf(fields: bytes = b"", infos: bytes = b"", counts: tuple[int, int] = (0, 0)) -> bytes:
    """Return the bytes of a GGUF file; `counts` are the numbers of tensors and of fields."""
    head = b"GGUF" + struct.pack("<IQQ", 3, *counts) + fields + infos
    return head + bytes(-len(head) % 32) + bytes(64)


def _field(kind: int, value: bytes, name: str = "x") -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _list(kind: int, count: int, value: bytes = b"") -> bytes:
    return _field(9, struct.pack("<IQ", kind, count) + value)


def _info(shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: str = "w") -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return _text(name) + dims + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"GG", "magic number at byte 0: bytes\n  got    4\n  limit  2"),
        (b"GGML" + bytes(64), r"first bytes are\n  got    b'GGML'"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "got    50331648"),
        (_gguf(counts=(2**63, 0)), "axes of tensor :\n  got    0"),
        (_gguf(counts=(0, 2**64 - 1)), "twice"),
        (_gguf(_field(0, b"\0"), counts=(0, 2**64 - 1))[:38], "name of a field at byte .*limit"),
        (
            _gguf(struct.pack("<Q", 2**50), counts=(0, 1)),
            "name of a field.*got    1125899906842624",
        ),
        (_gguf(_field(8, struct.pack("<Q", 10 * 2**30)), counts=(0, 1)), "got    10737418240"),
        (_gguf(_list(8, 2**60), counts=(0, 1)), "field x at byte .*got    8\n  limit"),
        (_gguf(_list(0, 2**60), counts=(0, 1)), "field x at byte .*got    1152921504606846976"),
        (_gguf(_list(9, 1), counts=(0, 1)), "lists in a list"),
        (_gguf(_field(99, b""), counts=(0, 1)), "kind of field x is\n  got    99\n  limit  12"),
        (_gguf(_field(7, b"\x01") * 2, counts=(0, 2)), "twice"),
        (_gguf(_field(8, struct.pack("<Q", 1) + b"\xff"), counts=(0, 1)), "UTF-8"),
        (
            _gguf(_field(4, struct.pack("<I", 3), "general.alignment"), counts=(0, 1)),
            "alignment is\n  got    3",
        ),
        (
            _gguf(infos=_info((1,) * 9), counts=(1, 0)),
            "axes of tensor w:\n  got    9\n  limit  1 to 4",
        ),
        (_gguf(infos=_info((2**63, 2**63)), counts=(1, 0)), "ends at.*limit  the file's"),
        (_gguf(infos=_info((17,)), counts=(1, 0)), r"tensor w of shape \(17,\), F32, ends at"),
        (_gguf(infos=_info((16,), offset=2**62), counts=(1, 0)), "ends at"),
        (_gguf(infos=_info((16,), kind=77), counts=(1, 0)), "kind of tensor w is\n  got    77"),
        (_gguf(infos=_info((33,), kind=8), counts=(1, 0)), "limit  multiples of Q8_0's 32"),
        (_gguf(infos=_info((16, 0)), counts=(1, 0)), "limit  at least one number"),
        (_gguf(infos=_info((16,)) * 2, counts=(2, 0)), "twice"),
        (
            _gguf(infos=_info((16,)) + _info((16,), name="v"), counts=(2, 0)),
            "v overlaps w|w overlaps",
        ),
    ],
)
def test_header_of_gguf(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(models.WeightsError, match=f"(?s)model.gguf is damaged.*{says}"):
        models.open(str(path))


def test_sound_gguf_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    fields = _field(7, b"\x01") + _list(5, 2, struct.pack("<ii", 3, -4)).replace(b"x", b"y")
    path.write_bytes(_gguf(fields, _info((16,)), counts=(1, 2)))
    found = gguf_header.read(path)
    assert found.fields == {"x": True, "y": [3, -4]}
    assert found.tensors["w"].shape == (16,) and found.tensors["w"].offset % 32 == 0


@pytest.mark.slow  # the gguf package takes seconds
def test_header_is_that_of_the_library(smollm2: models.Source) -> None:
    reader, found = gguf.GGUFReader(smollm2.path), gguf_header.read(Path(smollm2.path))
    theirs = {
        name: field.contents() for name, field in reader.fields.items() if name[:5] != "GGUF."
    }
    assert found.fields == theirs
    assert len(found.tensors) == len(reader.tensors)
    for tensor in reader.tensors:
        ours = found.tensors[tensor.name]
        assert ours.shape == tuple(tensor.shape.tolist())[::-1]
        assert (ours.kind, ours.offset) == (tensor.tensor_type, tensor.data_offset)
        assert ours.end == tensor.data_offset + tensor.n_bytes


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_cut_gguf(data: Path, tmp_path: Path, cut: int, smollm2: models.Source) -> None:
    path = tmp_path / "model.gguf"
    whole = Path(smollm2.path)
    with whole.open("rb") as file:
        path.write_bytes(file.read(cut))  # ends within the header
    with pytest.raises(models.WeightsError, match="is damaged"):
        models.open(str(path))
