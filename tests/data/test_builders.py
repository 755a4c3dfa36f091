"""TFDS builders: prepared once, read whole, and never with TensorFlow."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_jax.data import DataError, open_source
from tests.data import stand_in
from tests.data.stand_in import SIZES, rows


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tfds")
    for config in ("pair", "score"):
        open_source(f"tfds:glue_stand_in/{config}", str(folder))
    return folder


@pytest.mark.parametrize("config", ["pair", "score"])
@pytest.mark.parametrize("split", SIZES)
def test_every_example_comes_back(prepared: Path, config: str, split: str) -> None:
    examples = open_source(f"tfds:glue_stand_in/{config}:1.0.0", str(prepared)).examples(split)
    wanted = dict(rows(config, split))
    assert len(examples) == SIZES[split]
    assert {row["idx"]: row for row in examples} == wanted
    assert sorted(examples[i]["idx"] for i in range(len(examples))) == sorted(wanted)


def test_one_by_one_in_slices_and_iterated_are_the_same(prepared: Path) -> None:
    examples = open_source("tfds:glue_stand_in/pair", str(prepared)).examples("train")
    singly = [examples[i] for i in range(len(examples))]
    assert singly == list(examples) == examples[:] == [*examples[:60], *examples[60:]]
    with pytest.raises(IndexError):
        examples[len(examples)]


def test_declared_classes(prepared: Path) -> None:
    pair = open_source("tfds:glue_stand_in/pair", str(prepared))
    score = open_source("tfds:glue_stand_in/score", str(prepared))
    assert pair.classes("label") == ("different", "same")
    assert score.classes("label") == ()
    assert pair.classes("idx") is None
    assert pair.classes("nonsense") is None


def test_split_slices(prepared: Path) -> None:
    source = open_source("tfds:glue_stand_in/pair", str(prepared))
    head, tail = source.examples("train[:90%]"), source.examples("train[90%:]")
    assert [*head, *tail] == list(source.examples("train"))


def test_lost_records_are_an_error(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "glue_stand_in", tmp_path / "glue_stand_in")
    folder = tmp_path / "glue_stand_in" / "pair" / "1.0.0"
    (short,), (long,) = folder.glob("*test.array_record*"), folder.glob("*train.array_record*")
    shutil.copy(short, long)
    source = open_source("tfds:glue_stand_in/pair", str(tmp_path))
    with pytest.raises(DataError, match=r"(?s)5 records in .*train.* but 150 were written"):
        source.examples("train")


def test_a_format_that_needs_tensorflow_is_an_error(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared / "glue_stand_in", tmp_path / "glue_stand_in")
    info = tmp_path / "glue_stand_in" / "pair" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"(?s)tfrecord.*data.data_dir"):
        open_source("tfds:glue_stand_in/pair", str(tmp_path))


def test_unknown_split(prepared: Path) -> None:
    source = open_source("tfds:glue_stand_in/pair", str(prepared))
    with pytest.raises(
        DataError, match=r"(?s)no split 'valid'.*train, validation, test.*nearest: validation"
    ):
        source.examples("valid")


def test_unknown_config(prepared: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)glue_stand_in/pear"):
        open_source("tfds:glue_stand_in/pear", str(prepared))


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no data set 'gleu/sst2'.*nearest:.*glue"):
        open_source("tfds:gleu/sst2", str(tmp_path))


def test_glue_is_known_without_tensorflow(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    with pytest.raises(DataError, match=r"(?s)nearest"):
        open_source("tfds:gleu", str(tmp_path))  # registers the text data sets
    builder = tfds.builder("glue/mrpc", data_dir=tmp_path)
    assert {"sentence1", "sentence2", "label", "idx"} == set(builder.info.features)


def test_download_failure_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)could not be downloaded.*ConnectionError: no route"):
        open_source("tfds:glue_stand_in/offline", str(tmp_path))


SLOW = """
import os, sys, time
from tests.data import stand_in
from lora_jax.data import open_source
def slowly(config, split):
    for row in rows(config, split):
        os.write(1, b"a row\\n")
        time.sleep(0.05)
        yield row
rows, stand_in.rows = stand_in.rows, slowly
open_source("tfds:glue_stand_in/pair", sys.argv[1])
"""


def test_a_killed_preparation_does_not_poison_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=_environment()) as process:
        assert process.stdout is not None
        for _ in range(10):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.rglob("*incomplete*"))  # it was killed while it wrote
    examples = open_source("tfds:glue_stand_in/pair", str(tmp_path)).examples("train")
    assert len(examples) == SIZES["train"]


def test_two_preparations_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(config: str, split: str) -> list[tuple[int, dict[str, object]]]:
        monkeypatch.undo()
        open_source("tfds:glue_stand_in/pair", str(tmp_path))
        return stand_in.rows(config, split)

    monkeypatch.setattr(stand_in, "rows", overtaken)
    source = open_source("tfds:glue_stand_in/pair", str(tmp_path))
    assert len(source.examples("train")) == SIZES["train"]
    assert not list(tmp_path.rglob("*incomplete*"))


BLOCKED = """
import importlib.util, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
looked_up = importlib.util.find_spec  # TFDS asks with it whether TensorFlow is there: it is not
importlib.util.find_spec = lambda n, p=None: None if n == "tensorflow" else looked_up(n, p)
from tests.data import stand_in
from lora_jax.data import open_source
source = open_source("tfds:glue_stand_in/pair", sys.argv[1])
rows = list(source.examples("train"))
assert len(rows) == 150, len(rows)
assert "tensorflow" not in sys.modules
"""


@pytest.mark.slow  # the image data sets are prepared without it in one process
def test_tensorflow_is_not_needed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, str(tmp_path)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError(f"write() failed: {os.strerror(errno.ENOSPC)}; writing x"),  # array_record's
    ],
)
def test_a_full_disk_is_named(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(self: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(stand_in.GlueStandIn, "download_and_prepare", prepare)
    said = rf"cannot be prepared in {tmp_path}.* No space left (.|\n)*data\.data_dir"
    with pytest.raises(DataError, match=said):
        open_source("tfds:glue_stand_in/pair", str(tmp_path))
