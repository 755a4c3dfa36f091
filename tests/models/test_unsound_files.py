"""Weight files that lie: each is refused with the file, what it says and what it may say."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lora_jax import models
from lora_jax.models.weights import gguf_header, safetensors_file

# ---- safetensors -----------------------------------------------------------------------------


def _file(path: Path, header: Any, data: bytes = bytes(64), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _one(shape: Any, place: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": place}}


@pytest.mark.parametrize(
    ("header", "length", "says"),
    [
        ({}, 10 * 2**30, "header's length is.*got    10737418240 bytes.*limit  66 bytes"),
        ({}, 2**64 - 1, "got    18446744073709551615 bytes"),
        (b"{not json", None, "is no JSON"),
        (b"[" * 100_000, None, "is no JSON"),
        (b'{"w": ' + b"9" * 10_000 + b"}", None, "is no JSON"),
        (b"\xff\xfe{}", None, "is no JSON"),
        ([], None, "a JSON object"),
        ({"w": 3}, None, "got    3"),
        (_one([4, 4], [0, 64], "F99"), None, "got    dtype F99.*limit  one of BOOL"),
        (_one([4, 4], [0, 64], ["F32"]), None, "got    dtype"),
        (_one([2**40, 2**40], [0, 64]), None, r"got    shape \[1099511627776.*0 to \d+"),
        (_one([-4, -4], [0, 64]), None, r"got    shape \[-4, -4\]"),
        (_one([4.0, 4], [0, 64]), None, r"got    shape \[4\.0, 4\]"),
        (_one([True, 16], [0, 64]), None, r"got    shape \[True, 16\]"),
        (_one([100, 100, 100], [0, 64]), None, "got    64 bytes.*limit  4000000 bytes, for F32"),
        (_one([16], [64, 0]), None, "got    -64 bytes"),
        (_one([16], [0, 64, 128]), None, "data_offsets"),
        (_one([16], [0, 10**30]), None, "data_offsets"),
        (_one([20], [0, 80]), None, r"ends at.*byte \d+.*limit  the file's \d+ bytes"),
        (_one([16], None), None, "got    data_offsets None"),
    ],
)
def test_header_of_safetensors(tmp_path: Path, header: Any, length: int | None, says: str) -> None:
    path = _file(tmp_path / "model.safetensors", header, length=length)
    with pytest.raises(models.WeightsError, match=f"(?s)model.safetensors is damaged.*{says}"):
        safetensors_file.regions(path)


def test_tensors_that_share_bytes(tmp_path: Path) -> None:
    """A small file would otherwise fill a large model."""
    entry = _one([16], [0, 64])["w"]
    path = _file(tmp_path / "model.safetensors", {"a": entry, "b": entry})
    with pytest.raises(models.WeightsError, match="tensor b lies on a"):
        safetensors_file.regions(path)


def test_short_files(tmp_path: Path) -> None:
    for data in (b"", b"abc"):
        (tmp_path / "model").write_bytes(data)
        with pytest.raises(models.WeightsError, match=r"got    \d bytes\n  limit  at least 8"):
            safetensors_file.regions(tmp_path / "model")


def test_long_names_are_cut(tmp_path: Path) -> None:
    path = _file(tmp_path / "model", {"x" * 1_000_000: 3})
    with pytest.raises(models.WeightsError) as failure:
        safetensors_file.regions(path)
    assert len(str(failure.value)) < 1000


def test_every_dtype_of_the_library(tmp_path: Path) -> None:
    """The library writes, we read: the same shapes, bytes and dtypes."""
    kinds = [np.bool_, "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
    kinds += [jnp.bfloat16]
    tensors = {f"t{n}": np.arange(12).reshape(3, 4).astype(kind) for n, kind in enumerate(kinds)}
    tensors["none"] = np.zeros((0, 4), np.float32)
    safetensors.numpy.save_file(tensors, tmp_path / "model", metadata={"format": "pt"})
    found = safetensors_file.regions(tmp_path / "model")
    assert found.keys() == tensors.keys()
    for name, region in found.items():
        index = tuple(slice(0, size) for size in region.shape)
        np.testing.assert_array_equal(region.read(index), tensors[name])
        assert region.dtype == tensors[name].dtype


def test_cut_file_of_a_model(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(data / "golden_models" / "llama", folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(models.WeightsError, match=r"llama/model\.safetensors is damaged.*ends at"):
        models.open(str(folder)).load()


def test_integers_are_not_taken_for_weights(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(data / "golden_models" / "llama", folder)
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = "model.norm.weight"
    safetensors.numpy.save_file(tensors | {name: tensors[name].astype(np.int8)}, path)
    with pytest.raises(models.WeightsError, match=r"model\.norm\.weight is stored as int8"):
        models.open(str(folder)).load()


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "..", "", 3])
def test_index_names_files_of_its_own_folder(data: Path, tmp_path: Path, file: Any) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(data / "golden_models" / "bert", folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": file}}))
    with pytest.raises(models.WeightsError, match=r"index\.json: w is in .* beside the index"):
        models.open(str(folder)).load()
    index.write_text("{}")
    with pytest.raises(models.WeightsError, match="weight_map is NoneType"):
        models.open(str(folder)).load()


def test_tensor_in_two_files(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(data / "golden_models" / "bert", folder)
    first, second = sorted(folder.glob("*.safetensors"))
    both = safetensors.numpy.load_file(first) | safetensors.numpy.load_file(second)
    safetensors.numpy.save_file(both, second)
    with pytest.raises(models.WeightsError, match=r"is in .*-00001-of.* and in .*-00002-of"):
        models.open(str(folder)).load()


def test_more_layers_than_tensors(data: Path) -> None:
    """A thousand million layers are no list of names before they are an error."""
    model = models.open(str(data / "golden_models" / "llama"))
    config = dataclasses.replace(model.config, num_layers=10**9)
    with pytest.raises(models.WeightsError, match="too few for 1000000000 layers"):
        model.load(config)


# ---- GGUF ------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _gguf(fields: bytes = b"", infos: bytes = b"", counts: tuple[int, int] = (0, 0)) -> bytes:
    """A GGUF file by hand: `counts` are those of the tensors and of the fields."""
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
        (b"GG", "got    2 bytes"),
        (b"GGML" + bytes(64), r"first bytes are\n  got    b'GGML'"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "got    50331648"),
        (_gguf(counts=(2**63, 0)), "tensors at byte 16:\n  got    9223372036854775808\n  limit  3"),
        (_gguf(counts=(0, 2**64 - 1)), "fields at byte 24:\n  got    18446744073709551615"),
        (
            _gguf(struct.pack("<Q", 2**50), counts=(0, 1)),
            "name of a field.*got    1125899906842624",
        ),
        (_gguf(_field(8, struct.pack("<Q", 10 * 2**30)), counts=(0, 1)), "got    10737418240"),
        (_gguf(_list(8, 2**60), counts=(0, 1)), "values of x.*got    1152921504606846976"),
        (_gguf(_list(0, 2**60), counts=(0, 1)), "values of x.*got    1152921504606846976"),
        (_gguf(_list(9, 1), counts=(0, 1)), "lists in a list"),
        (_gguf(_field(99, b""), counts=(0, 1)), "kind of field x is\n  got    99\n  limit  12"),
        (_gguf(_field(7, b"\x01") * 2, counts=(0, 2)), "twice"),
        (_gguf(_field(8, struct.pack("<Q", 1) + b"\xff"), counts=(0, 1)), "UTF-8"),
        (
            _gguf(_field(4, struct.pack("<I", 3), "general.alignment"), counts=(0, 1)),
            "alignment is\n  got    3",
        ),
        (_gguf(infos=_info((1,) * 9), counts=(1, 0)), "axes of tensor w:\n  got    9\n  limit  4"),
        (_gguf(infos=_info((2**63, 2**63)), counts=(1, 0)), "ends at.*limit  the file's"),
        (_gguf(infos=_info((17,)), counts=(1, 0)), r"tensor w of shape \(17,\), float32, ends at"),
        (_gguf(infos=_info((16,), offset=2**62), counts=(1, 0)), "ends at"),
        (_gguf(infos=_info((16,), kind=77), counts=(1, 0)), "kind of tensor w is\n  got    77"),
        (_gguf(infos=_info((33,), kind=8), counts=(1, 0)), "limit  multiples of Q8_0's 32"),
        (_gguf(infos=_info((16,)) * 2, counts=(2, 0)), "twice"),
        (
            _gguf(infos=_info((16,)) + _info((16,), name="v"), counts=(2, 0)),
            "v lies on w|w lies on",
        ),
    ],
)
def test_header_of_gguf(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(models.WeightsError, match=f"(?s)model.gguf is damaged.*{says}"):
        models.open(str(path))


def test_sound_gguf_by_hand(tmp_path: Path) -> None:
    """What the refusals above are refused from is otherwise read."""
    path = tmp_path / "model.gguf"
    fields = _field(7, b"\x01") + _list(5, 2, struct.pack("<ii", 3, -4)).replace(b"x", b"y")
    path.write_bytes(_gguf(fields, _info((16,)), counts=(1, 2)))
    found = gguf_header.read(path)
    assert found.fields == {"x": True, "y": [3, -4]}
    assert found.tensors["w"].shape == (16,) and found.tensors["w"].region.offset % 32 == 0


def test_header_is_that_of_the_library(smollm2: models.Source) -> None:
    """Every field and every tensor of a real file, as the gguf package reads them."""
    reader, found = gguf.GGUFReader(smollm2.path), gguf_header.read(Path(smollm2.path))
    theirs = {
        name: field.contents() for name, field in reader.fields.items() if name[:5] != "GGUF."
    }
    assert found.fields == theirs
    assert len(found.tensors) == len(reader.tensors)
    for tensor in reader.tensors:
        ours = found.tensors[tensor.name]
        assert ours.shape == tuple(tensor.shape.tolist())[::-1]
        assert (ours.kind, ours.region.offset) == (tensor.tensor_type, tensor.data_offset)
        assert (ours.region.shape, ours.region.dtype) == (tensor.data.shape, tensor.data.dtype)


@pytest.mark.parametrize("cut", [1, 100, 1000])
def test_cut_gguf(data: Path, tmp_path: Path, cut: int, smollm2: models.Source) -> None:
    path = tmp_path / "model.gguf"
    whole = Path(smollm2.path)
    with whole.open("rb") as file:
        path.write_bytes(file.read(cut))  # ends within the header
    with pytest.raises(models.WeightsError, match="is damaged"):
        models.open(str(path))
