"""A damaged checkpoint is found and the one before it is used; a full disk costs no earlier one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import pathlib
import resource
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
import train
from lora_jax import LoraError
from lora_jax.checkpoint import adapter_path
from lora_jax.training import export, processes
from lora_jax.training.checkpoints import Checkpoints
from lora_jax.training.state import State
from tests.training.runs import OWN, SMALL, bits

# If several reads fail, Orbax reports the first; the others complain when they are collected.
ABANDONED = "ignore::pytest.PytestUnraisableExceptionWarning"
pytestmark = pytest.mark.filterwarnings(ABANDONED)

ROWS = 16
LAYOUT = lora_jax.Layout((lora_jax.Target("q", (ROWS, 8), (), (0,), (1,), 4, 4.0),))


def state(step: int, rows: int = ROWS) -> State:
    """A state with one array of each kind that a state may hold."""
    a = jax.random.normal(jax.random.key(step), (rows, 4))
    factors = lora_jax.Factors(a, jnp.full((4, 8), step, jnp.bfloat16))
    return State(
        {"adapters": {"q": factors}, "base": {"head/w": jnp.arange(6, dtype=jnp.int8)}},
        (jnp.int32(step), {"q": a * 2}),
        jnp.int32(step),
        jnp.int32(0),
        jax.random.fold_in(jax.random.key(7), step),
    )


def write(folder: pathlib.Path, *steps: int) -> pathlib.Path:
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"step": step, "text": "naïve \n"})
    return folder


def read(folder: pathlib.Path) -> tuple[State, Any, list[str]]:
    said: list[str] = []
    with Checkpoints(folder, report=said.append) as checkpoints:
        return *checkpoints.restore(state(0)), said


def names(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of the checkpoints of steps 3 and 4."""
    return write(tmp_path_factory.mktemp("whole") / "checkpoints", 3, 4)


@pytest.fixture
def copy(whole: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(whole, tmp_path / "checkpoints"))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def flip(file: pathlib.Path, bit: int) -> None:
    file.write_bytes(flipped(file.read_bytes(), bit))


def data_files(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    """Return the files that contain the arrays; their names are random."""
    return [p for p in checkpoint.rglob("d/*") if "ocdbt.process" not in str(p)]


def test_bit_for_bit(whole: pathlib.Path, copy: pathlib.Path) -> None:
    found, notes, said = read(copy)
    assert bits(found) == bits(state(4)) and not said
    assert notes == {"step": 4, "text": "naïve \n"}
    assert jax.tree.structure(found) == jax.tree.structure(state(4))


def damages(file: pathlib.Path) -> Iterator[bytes | None]:
    """Yield damaged contents of `file`; None stands for a file that is missing."""
    data = file.read_bytes()
    yield None
    if data:  # empty files only mark complete checkpoints
        yield data[: len(data) // 2]
        yield flipped(data, int(len(data) * 8 * 0.4))


def test_whatever_is_damaged(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """With any file missing, cut, or with a flipped bit, the exact state or the one before is
    restored. In the second case there is one message."""
    results = set()
    for file in sorted(p.relative_to(whole) for p in (whole / "4").rglob("*") if p.is_file()):
        for data in damages(whole / file):
            copy = pathlib.Path(shutil.copytree(whole, tmp_path / "copy"))
            (copy / file).unlink()
            if data is not None:
                (copy / file).write_bytes(data)
            found, notes, said = read(copy)
            step = notes["step"]
            assert bits(found) == bits(state(step)), file
            assert len(said) == 4 - step, file
            assert names(copy) == (["3", "4"] if step == 4 else ["3", "damaged-4"]), file
            results.add((file.parts[1], step))
            shutil.rmtree(copy)
    assert {("state", 3), ("meta", 3), ("_CHECKPOINT_METADATA", 4)} <= results


def test_what_is_said(copy: pathlib.Path) -> None:
    (file,) = data_files(copy / "4")
    flip(file, file.stat().st_size * 4)
    *_, said = read(copy)
    assert len(said) == 1
    assert f"{copy / '4'}: damaged: the description of its state cannot be read" in said[0]
    assert "set aside as damaged-4, and the checkpoint of step 3 is used" in said[0]


def test_an_array_that_is_not_listed(copy: pathlib.Path) -> None:
    file = copy / "4" / "meta" / "_strings.json"
    data = json.loads(json.loads(file.read_text())["text"])
    del data["arrays"]["trained/adapters/q/a"]
    text = json.dumps(data)
    sealed = {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    file.write_text(json.dumps(sealed))
    *_, said = read(copy)
    assert "does not list:\n  trained/adapters/q/a" in said[0]


def test_hashes_find_what_no_checksum_does(copy: pathlib.Path) -> None:
    """The hashes find another run's array of the same shape, whose own checksums are all valid."""
    other = copy.parent / "other"
    with Checkpoints(other) as checkpoints:
        changed = state(4)
        q = changed.trained["adapters"]["q"]
        a = q.a.at[3, 1].set(jnp.nextafter(q.a[3, 1], jnp.float32(9)))
        trained = {**changed.trained, "adapters": {"q": q._replace(a=a)}}
        checkpoints.save(4, changed._replace(trained=trained), {"step": 4})
    shutil.rmtree(copy / "4" / "state")
    shutil.copytree(other / "4" / "state", copy / "4" / "state")
    _, notes, said = read(copy)
    assert notes["step"] == 3
    assert "trained/adapters/q/a holds other bits than were saved" in said[0]
    assert "adapters/q/b" not in said[0]


def test_the_step_of_a_damaged_one_is_saved_again(copy: pathlib.Path) -> None:
    for expected in (["3", "4", "damaged-4"], ["3", "4", "damaged-4", "damaged-4-1"]):
        (file,) = data_files(copy / "4")
        flip(file, 80)
        with Checkpoints(copy, report=lambda _: None) as checkpoints:
            _, notes = checkpoints.restore(state(0))
            assert notes["step"] == 3
            checkpoints.save(4, state(4), {"step": 4})
        assert names(copy) == expected
    assert read(copy)[1]["step"] == 4


def test_none_is_whole(copy: pathlib.Path) -> None:
    for step in ("3", "4"):
        (file,) = data_files(copy / step)
        file.unlink()
    for _ in range(2):
        with pytest.raises(LoraError, match=r"no checkpoint (.|\n)*/4: (.|\n)*/3: (.|\n)*--fresh"):
            read(copy)
        assert names(copy) == ["3", "4"]


def test_another_structure_is_no_damage(copy: pathlib.Path) -> None:
    with Checkpoints(copy) as checkpoints:
        match = r"trained/adapters/q/a: float32\[16, 4\] there, float32\[24, 4\] in this run"
        with pytest.raises(LoraError, match=match):
            checkpoints.restore(state(0, rows=24))
    assert names(copy) == ["3", "4"]


def test_other_meshes(tmp_path: pathlib.Path) -> None:
    """A state saved on one mesh is restored on the next: (8, 1, 1), (2, 2, 2), and one device."""
    whole = state(5)

    def on(*sizes: int) -> State:
        devices = jax.devices()[: math.prod(sizes)]
        axes = ("data", "fsdp", "tensor")
        mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * 3, devices=devices)
        row = "data" if sizes == (8, 1, 1) else ("fsdp", "tensor")
        return jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, P(row) if ROWS in x.shape else P())),
            whole,
        )

    meshes = [on(8, 1, 1), on(2, 2, 2), on(1, 1, 1), whole]
    with Checkpoints(tmp_path / "0") as checkpoints:
        checkpoints.save(5, meshes[0], {})
    for i, like in enumerate(meshes):
        with Checkpoints(tmp_path / str(i)) as checkpoints:
            found, _ = checkpoints.restore(like)
            places = [[x.sharding for x in jax.tree.leaves(tree)] for tree in (found, like)]
            assert places[0] == places[1]
        assert bits(found) == bits(whole)
        with Checkpoints(tmp_path / str(i + 1)) as checkpoints:
            checkpoints.save(5, found, {})


# ---- a full disk


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Simulate a full disk without a mount: no file of this process may grow past 64 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


LARGE = 2**14  # an array with so many rows is larger than the limit


def save_without_room(folder: pathlib.Path, error: BaseException | None) -> None:
    with full_disk(), Checkpoints(folder) as checkpoints:
        checkpoints.save(5, state(5, rows=LARGE), {})
        if error is not None:
            raise error


def test_a_full_disk_is_an_error_at_the_next_save(whole: pathlib.Path, copy: pathlib.Path) -> None:
    with Checkpoints(copy) as checkpoints, full_disk():
        checkpoints.save(5, state(5, rows=LARGE), {})
        with pytest.raises(LoraError, match=r"step 5 is lost; that of step 4 is kept(.|\n)*/5"):
            checkpoints.save(6, state(6), {})
    assert names(copy)[:2] == ["3", "4"] and "5" not in names(copy)
    assert bits(read(copy)[0]) == bits(state(4))


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt(), processes.Preempted("step 5")])
def test_a_full_disk_is_an_error_at_the_end(copy: pathlib.Path, stop: Any) -> None:
    """It is an error even if the run only stops, as it would say that its last step is saved."""
    with pytest.raises(LoraError, match="step 5 is lost"):
        save_without_room(copy, stop)
    assert bits(read(copy)[0]) == bits(state(4))


def test_an_error_of_the_run_goes_first(copy: pathlib.Path) -> None:
    with pytest.raises(KeyError, match="mine"):
        save_without_room(copy, KeyError("mine"))


def test_a_full_disk_keeps_the_earlier_export(tmp_path: pathlib.Path) -> None:
    trained = state(1).trained
    export.save(tmp_path, "best", LAYOUT, trained)
    large = {**trained, "base": {"head": jax.random.normal(jax.random.key(0), (LARGE, 4))}}
    with full_disk(), pytest.raises(LoraError, match=r"best cannot be written"):
        export.save(tmp_path, "best", LAYOUT, large)
    assert bits(export.load(tmp_path, "best")) == bits(trained)
    export.save(tmp_path, "best", LAYOUT, state(2).trained)
    assert bits(export.load(tmp_path, "best")) == bits(state(2).trained)
    assert names(tmp_path / "adapters") == ["best"]


def test_a_kill_between_the_renames_of_an_export(tmp_path: pathlib.Path) -> None:
    export.save(tmp_path, "best", LAYOUT, state(1).trained)
    (tmp_path / "adapters" / "best").rename(tmp_path / "adapters" / "best.old")
    name, folder = adapter_path.find_one(str(tmp_path))
    assert (name, folder.name) == (tmp_path.name, "best.old")
    assert bits(lora_jax.restore(folder).parameters) == bits(state(1).trained["adapters"])
    export.save(tmp_path, "best", LAYOUT, state(2).trained)
    assert bits(export.load(tmp_path, "best")) == bits(state(2).trained)
    assert names(tmp_path / "adapters") == ["best"]


def test_train_ends_with_an_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, save = tmp_path / "run", Checkpoints.save

    def limited(self: Checkpoints, step: int, state: State, notes: dict[str, Any]) -> None:
        if step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
        save(self, step, state, {**notes, "large": " " * 2**21 * (step == 8)})

    monkeypatch.setattr(Checkpoints, "save", limited)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        arguments = ["--config", OWN, "--run-dir", str(path), *SMALL, "--checkpoint-every", "4"]
        assert train.main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    error = " ".join(capsys.readouterr().err.split())
    assert "error: " in error and "of step 4 is kept" in error
    assert "4" in names(path / "checkpoints") and "8" not in names(path / "checkpoints")
