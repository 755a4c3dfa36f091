"""Sharded loading: the same numbers, no other bytes are read, no second copy in memory."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax import models, sharding
from lora_jax.models.placement import rules
from lora_jax.models.weights import families, gguf_header
from lora_jax.models.weights.disk_arrays import Index
from lora_jax.paths import flatten
from lora_jax.system.safetensors_reader import StoredTensor
from tests.models.gguf_files import of_config, written

ROOT = Path(__file__).parents[3]
AXES = ("data", "fsdp", "tensor")
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
Tensors = Mapping[str, np.ndarray]
StoredForm = Callable[[Path, dict[str, Any], Tensors], Path]

# On 8 devices over `tensor`, each has half a key head and a quarter of a quantised block of 32.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "attention_bias": True,
    "tie_word_embeddings": False,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
# Here an eighth of a tensor is made of whole blocks of 32 and of whole heads.
WIDE = LLAMA | {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 8}
WIDE |= {"attention_bias": False, "num_hidden_layers": 1}


# ---- files -----------------------------------------------------------------------------------


def _tensors(json_: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return random float32 tensors under Hugging Face's names, for every parameter."""
    config = families.parse(json_, "")
    shapes, found = flatten(models.shapes(config)), {}
    rng = np.random.default_rng(0)
    for row in families.FAMILIES[json_["model_type"]].names.rows:
        for layer in range(config.num_layers if row.layered else 1):
            leaf = shapes.get(row.path.format(layer=layer))
            if leaf is not None:
                value = rng.standard_normal(leaf.shape, np.float32)
                kernel = row.transposed
                found[row.hf.format(layer=layer)] = (value.T if kernel else value).copy()
    return found


def _single(folder: Path, json_: dict[str, Any], tensors: Tensors) -> Path:
    (folder / "config.json").write_text(json.dumps(json_))
    safetensors.numpy.save_file(dict(tensors), folder / "model.safetensors")
    return folder


def _bfloat16(folder: Path, json_: dict[str, Any], tensors: Tensors) -> Path:
    low = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
    return _single(folder, json_, low)


def _indexed(folder: Path, json_: dict[str, Any], tensors: Tensors) -> Path:
    (folder / "config.json").write_text(json.dumps(json_))
    places = {}
    for part in range(2):
        file = f"model-{part}.safetensors"
        these = {name: tensors[name] for name in sorted(tensors)[part::2]}
        safetensors.numpy.save_file(these, folder / file)
        places |= dict.fromkeys(these, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return folder


def _gguf(kind: gguf.GGMLQuantizationType, folder: Path, json_: Any, tensors: Tensors) -> Path:
    """Write kernels and embeddings as this kind, and the rest in float32.

    q and k are not permuted, as they are random in either order.
    """
    path = folder / "model.gguf"
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, json_["num_hidden_layers"])
    with written(path, **of_config(json_)) as writer:
        for name, value in tensors.items():
            stored = table.get_name(name, (".weight", ".bias"))
            if value.ndim == 2:
                writer.add_tensor(stored, gguf.quants.quantize(value, kind), raw_dtype=kind)
            else:
                writer.add_tensor(stored, value)
    return path


def _of(kind: str) -> StoredForm:
    return lambda *what: _gguf(gguf.GGMLQuantizationType[kind], *what)


FORMS: dict[str, tuple[StoredForm, dict[str, Any]]] = {
    "safetensors": (_single, LLAMA),
    "indexed": (_indexed, LLAMA),
    "bfloat16": (_bfloat16, LLAMA),
    "bert": (_indexed, BERT),
    "gguf_f32": (_of("F32"), LLAMA),
    "gguf_bf16": (_of("BF16"), LLAMA),
    "gguf_q8_0": (_of("Q8_0"), LLAMA),
    "gguf_q4_1": (_of("Q4_1"), LLAMA),
}


@pytest.fixture(scope="module", params=FORMS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    write, json_ = FORMS[request.param]
    return models.open(str(write(tmp_path_factory.mktemp("model"), json_, _tensors(json_))))


def _shardings(config: Any, sizes: tuple[int, int, int]) -> Any:
    mesh = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)
    shapes = models.shapes(config)
    specs = sharding.specs(rules(config), shapes)
    placed: Any = {}
    for path, spec in specs.items():
        *folders, name = path.split("/")
        branch = placed
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[name] = NamedSharding(mesh, spec)
    return placed


# ---- the same numbers ------------------------------------------------------------------------


@pytest.mark.few(6)
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
def test_shards_are_those_of_the_whole(model: models.Source, scanned: bool) -> None:
    low = {"param_dtype": jnp.bfloat16} if scanned else {}
    config = dataclasses.replace(model.config, scan_layers=scanned, **low)
    whole = flatten(model.load(config))
    for sizes in MESHES:
        asked = _shardings(config, sizes)
        params, asked = flatten(model.load(config, shardings=asked)), flatten(asked)
        assert params.keys() == whole.keys()
        for path, leaf in params.items():
            assert leaf.sharding == asked[path], path
            assert leaf.dtype == config.param_dtype
            np.testing.assert_array_equal(leaf, whole[path], err_msg=f"{path} on {sizes}")


def test_layers_and_other_axes_may_be_sharded_too(model: models.Source) -> None:
    """The loader takes any sharding: a stack over `data`, and a kernel over its second axis."""
    config = dataclasses.replace(model.config, scan_layers=True)
    mesh = jax.make_mesh((2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)

    def shard(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = ("data", None, ("tensor", "fsdp")) if leaf.ndim == 3 else ("tensor",)
        return NamedSharding(mesh, PartitionSpec(*axes))

    asked = jax.tree.map(shard, models.shapes(config))
    params = model.load(config, shardings=asked)
    whole = model.load(config)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert jax.tree.all(jax.tree.map(lambda leaf, at: leaf.sharding == at, params, asked))


def test_axis_that_is_not_divided_is_named(tmp_path: Path) -> None:
    model = models.open(str(_single(tmp_path, BERT, _tensors(BERT))))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    at = NamedSharding(mesh, PartitionSpec("fsdp"))
    asked = jax.tree.map(lambda _: at, models.shapes(model.config))
    with pytest.raises(models.WeightsError, match=r"embeddings/word/embedding: .*\(30, 16\)"):
        model.load(shardings=asked)


# ---- the bytes -------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each part that is read from a file."""
    sizes: list[int] = []

    def counting(read: Callable[[Any, Index], np.ndarray]) -> Callable[[Any, Index], np.ndarray]:
        def count(tensor: Any, index: Index) -> np.ndarray:
            part = read(tensor, index)
            sizes.append(part.nbytes)
            return part

        return count

    for kind, name in ((gguf_header.Quantised, "read"), (StoredTensor, "part")):
        monkeypatch.setattr(kind, name, counting(getattr(kind, name)))
    return sizes


@dataclasses.dataclass(frozen=True)
class _Alone:
    """A sharding as it is seen by a process that has one of the mesh's devices."""

    of: NamedSharding
    device: jax.Device
    memory_kind: str | None = None

    def shard_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.of.shard_shape(shape)

    def addressable_devices_indices_map(self, shape: tuple[int, ...]) -> dict[jax.Device, Any]:
        return {self.device: self.of.devices_indices_map(shape)[self.device]}


@pytest.mark.matrix
@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("name", ["safetensors", "bfloat16", "gguf_f32", "gguf_q8_0"])
def test_a_process_reads_what_its_devices_hold(
    name: str,
    sizes: tuple[int, int, int],
    scanned: bool,
    tmp_path: Path,
    counted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = models.open(str(FORMS[name][0](tmp_path, WIDE, _tensors(WIDE))))
    config = dataclasses.replace(model.config, scan_layers=scanned)
    asked = _shardings(config, sizes)
    whole = model.load(config)
    everything = sum(counted)
    counted.clear()

    join = jax.make_array_from_single_device_arrays

    def alone(shape: Any, at: Any, arrays: Any) -> jax.Array:
        return arrays[0] if isinstance(at, _Alone) else join(shape, at, arrays)

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", alone)
    device = jax.devices()[5]
    parts = model.load(config, shardings=jax.tree.map(lambda at: _Alone(at, device), asked))
    assert 0 < sum(counted) <= 1.1 * everything / 8

    def same(part: jax.Array, full: jax.Array, at: NamedSharding) -> None:
        assert part.devices() == {device}
        held = at.devices_indices_map(full.shape)[device]
        np.testing.assert_array_equal(part, np.asarray(full)[held])

    jax.tree.map(same, parts, whole, asked)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_copies_are_read_once(
    sizes: tuple[int, int, int], tmp_path: Path, counted: list[int]
) -> None:
    tensors = _tensors(WIDE)
    model = models.open(str(_single(tmp_path, WIDE, tensors)))
    model.load(shardings=_shardings(model.config, sizes))
    assert sum(counted) == sum(value.nbytes for value in tensors.values())


# ---- the memory ------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize(
    "form", ["float32-bfloat16", pytest.param("Q8_0-bfloat16", marks=pytest.mark.slow)]
)
def test_host_memory_is_that_of_the_shards(form: str, tmp_path: Path) -> None:
    """The benchmark's bound holds with 80 MB in place of 500: a second copy would break it."""
    command = [sys.executable, "-m", "benchmarks.load", "--one", form, "--tiny", "--scan"]
    command += ["--folder", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["landed"] > 100e6
    assert math.isclose(found["landed"], found["expected"], rel_tol=0.01)
    assert found["peak"] < 1.3 * found["landed"] + 80e6
