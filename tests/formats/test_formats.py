"""Files of an earlier lora_jax can be read, found and continued for ever.

`v1` was written at commit 12a1ad2 (JAX 0.10.2, Orbax 0.12.8) by the commands in each test. Its
files are never made again; a new format gets a new folder next to it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
import train
from lora_jax.checkpoint.adapter import restore_about
from lora_jax.cli import predict, report
from lora_jax.report import run_files
from lora_jax.sweeps.comparison import gather
from lora_jax.sweeps.loop import folder as group_folder
from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.training import config_json, directory
from tests import npz
from tests.formats import small
from tests.training import tiny

HERE = pathlib.Path(__file__).parent
V1 = HERE / "v1"
V2 = HERE / "v2"  # the layout of format 2, which has kinds of update, scalings and parts
SMALL = str(HERE / "small.py")
RUN, SWEEP = "runs/small-dc24168e", "runs/small-sweep-f748f202"


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A working directory with a copy of the runs, so that the originals cannot change."""
    shutil.copytree(V1 / "run_directories", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arrays(run: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of an exported adapter by path."""
    _, adapters, _ = lora_jax.restore(run / "adapters" / name)
    flat = {f"{p}/{n}": getattr(f, n) for p, f in adapters.items() for n in ("a", "b")}
    return {
        path: np.asarray(x)
        for path, x in (flat | lora_jax.restore(run / "adapters" / name).trainable).items()
    }


def forget_the_end(run: pathlib.Path) -> None:
    """Turn a finished run into one that was stopped after its first checkpoint."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapters/last")
    shutil.rmtree(run / "checkpoints/8")


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        # On the machine that wrote them the bits are equal; another CPU rounds differently.
        np.testing.assert_allclose(found[path], value, rtol=2e-5, atol=1e-6, err_msg=path)


def test_an_adapter_of_every_kind() -> None:
    """An adapter with every kind of update has the arrays and merged weights that were saved."""
    layout, adapters, _ = lora_jax.restore(V2 / "kinds")
    saved = npz.read(V2 / "kinds.npz")
    kinds = {"lora", "dora", "vera", "loha", "lokr", "bias"}
    assert {t.kind for t in layout.targets} == kinds and len(layout.targets) == 8
    assert [x.path for x in layout.left_out] == ["head"]
    for path, parameters in adapters.items():
        for name, x in parameters._asdict().items():
            np.testing.assert_array_equal(np.asarray(x), saved[f"{path}/{name}"])
    w = {t.path: saved[f"w/{t.path}"] for t in layout.targets}
    merged = lora_jax.merge(layout, w, adapters)
    assert_same(
        {path: np.asarray(x) for path, x in merged.items()},
        {path: saved[f"merged/{path}"] for path in merged},
    )


def test_adapter() -> None:
    layout, adapters, _ = lora_jax.restore(V1 / "adapter")
    saved = npz.read(V1 / "adapter.npz")
    for path, factors in adapters.items():
        for name in ("a", "b"):
            value = np.asarray(getattr(factors, name).astype(jnp.float32))
            np.testing.assert_array_equal(value, saved[f"{path}/{name}"])
    assert adapters["q"].a.dtype == jnp.bfloat16
    base = lora_jax.restore(V1 / "adapter").trainable
    np.testing.assert_array_equal(base["bias"], saved["base/bias"])
    assert restore_about(V1 / "adapter") == {"made": "by hand"}
    assert layout == lora_jax.Layout.from_json((V1 / "layout.json").read_text())
    assert (layout["layers"].stack, layout["q"].outputs, layout["q"].fold) == ((0,), (1, 2), True)
    params = {"layers": jnp.ones((3, 4, 4)), "q": jnp.ones((4, 2, 3)), "bias": jnp.zeros(3)}
    lora_jax.restore(V1 / "adapter", params=params)  # the fingerprint of the base still counts
    with pytest.raises(lora_jax.LoraError, match="layers"):
        lora_jax.restore(V1 / "adapter", params={**params, "layers": jnp.zeros((3, 4, 4))})


def test_a_finished_run_is_found(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", SMALL]) == 0
    assert f"{RUN} is finished" in capsys.readouterr().out
    assert [p.name for p in (folder / "runs").glob("small-*")].count("small-dc24168e") == 1
    assert len(list((folder / "runs").glob("small-*"))) == 2


@pytest.mark.standard_promotion
def test_a_stopped_run_goes_on(folder: pathlib.Path) -> None:
    expected = arrays(folder / RUN, "last")
    forget_the_end(folder / RUN)
    assert train.main(["--config", SMALL]) == 0
    assert_same(arrays(folder / RUN, "last"), expected)
    lines = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "split" not in x] == list(range(1, 9))
    assert len(list((folder / "runs").glob("small-*"))) == 2


@pytest.mark.standard_promotion
def test_a_stopped_sweep_goes_on(folder: pathlib.Path) -> None:
    members = [folder / SWEEP / name for name in ("rank=1", "rank=2")]
    expected = [arrays(member, "last") for member in members]
    for member in members:
        forget_the_end(member)
    assert train.main(["--config", f"{SMALL}:sweep"]) == 0
    for member, saved in zip(members, expected, strict=True):
        assert_same(arrays(member, "last"), saved)
    assert len(list((folder / "runs").glob("small-*"))) == 2


def test_an_old_name_of_a_field_is_read_and_found_again() -> None:
    """`lora.trainable` was once `lora.beside`: old runs are read and found by their hash.

    The hashes are from commit 12a1ad2.
    """
    lora = dataclasses.replace(small.config.lora, trainable=("first/bias",))
    config = dataclasses.replace(small.config, lora=lora)
    stored = config_json.to_dict(config)
    stored["lora"]["beside"] = stored["lora"].pop("trainable")
    assert config_json.changes(stored, config) == []
    assert config_json.changes(stored, small.config) == ["lora.trainable: ['first/bias'] -> None"]
    assert directory.default("small", config).name == "small-2982c42e"
    sweep = SweepConfig(base=small.config, grid={"lora.trainable": (("first/bias",), None)})
    assert group_folder("small", sweep.expand()).name == "small-15e1bc4e"
    assert [member.name for member in sweep.expand().members] == ["beside=bias", "beside=None"]


def test_an_old_summary_has_the_names_of_today() -> None:
    """An old summary is read with the names of today."""
    found = directory.summary(V1 / "run_directories/small-dc24168e")
    assert found is not None and found["trainable_parameters"] == 5
    (left,) = run_files.read(V1 / "run_directories/small-dc24168e")
    assert left.config["lora"]["trainable"] is None
    assert left.summary is not None and left.summary["trainable_parameters"] == 5


def test_an_old_run_is_compared_with_a_new_one(tmp_path: pathlib.Path) -> None:
    """An old run does not differ from a new one by a renamed field."""
    old = json.loads((V1 / "run_directories/small-dc24168e/config.json").read_text())
    old["lora"]["beside"] = ["head/**"]
    summary = directory.summary(V1 / "run_directories/small-dc24168e")
    assert summary is not None
    for name, config in (("old", old), ("new", config_json.upgrade(old))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    runs = [{**summary, "run": str(tmp_path / name)} for name in ("old", "new")]
    assert gather(runs).varied == ()


def test_a_classifier_predicts(folder: pathlib.Path) -> None:
    tiny.write_model(folder / "model", tiny.ROBERTA)
    arguments = ["--file", str(V1 / "texts.jsonl"), "--out", "out.jsonl", "--adapter", "runs/text"]
    assert predict.main(arguments) == 0
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (V1 / "predicted.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5),
            row["probabilities"],
            other["probabilities"],
        )


def test_a_report_is_written(folder: pathlib.Path) -> None:
    tiny.write_model(folder / "model", tiny.ROBERTA)
    for run in ("runs/text", RUN, SWEEP):
        assert report.main([run]) == 0
        assert (folder / run / "report/report.html").is_file()
