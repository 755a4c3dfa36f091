"""Files of every released format can be read, found and continued for ever.

`tests.formats.make` wrote `v1`; after its release a new format gets a new folder next to it.
"""

from __future__ import annotations

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
from tests import npz
from tests.formats import HERE, RUN, RUNS, SWEEP, V1
from tests.training import tiny

SMALL = str(HERE / "small.py")
NAME, SWEEP_NAME = RUN.name, SWEEP.name


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A working directory with a copy of the runs, so that the originals cannot change."""
    shutil.copytree(RUNS, tmp_path / "runs")
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
    layout, adapters, _ = lora_jax.restore(V1 / "kinds")
    saved = npz.read(V1 / "kinds.npz")
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
    assert f"runs/{NAME} is finished" in capsys.readouterr().out
    assert [p.name for p in (folder / "runs").glob("small-*")].count(NAME) == 1
    assert len(list((folder / "runs").glob("small-*"))) == 2


@pytest.mark.standard_promotion
def test_a_stopped_run_goes_on(folder: pathlib.Path) -> None:
    expected = arrays(folder / "runs" / NAME, "last")
    forget_the_end(folder / "runs" / NAME)
    assert train.main(["--config", SMALL]) == 0
    assert_same(arrays(folder / "runs" / NAME, "last"), expected)
    lines = [
        json.loads(line)
        for line in (folder / "runs" / NAME / "metrics.jsonl").read_text().splitlines()
    ]
    assert [x["step"] for x in lines if "split" not in x] == list(range(1, 9))
    assert len(list((folder / "runs").glob("small-*"))) == 2


@pytest.mark.standard_promotion
def test_a_stopped_sweep_goes_on(folder: pathlib.Path) -> None:
    members = [folder / "runs" / SWEEP_NAME / name for name in ("rank=1", "rank=2")]
    expected = [arrays(member, "last") for member in members]
    for member in members:
        forget_the_end(member)
    assert train.main(["--config", f"{SMALL}:sweep"]) == 0
    for member, saved in zip(members, expected, strict=True):
        assert_same(arrays(member, "last"), saved)
    assert len(list((folder / "runs").glob("small-*"))) == 2


def test_a_classifier_predicts(folder: pathlib.Path) -> None:
    tiny.write_model(folder / "model", tiny.ROBERTA)
    files = ["--file", str(V1 / "texts.jsonl"), "--out", "out.jsonl"]
    assert predict.main([*files, "--adapter", "runs/text", "--base", "model"]) == 0
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (V1 / "predicted.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [row["prediction"] for row in wanted]
    for row, other in zip(rows, wanted, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5),
            row["probabilities"],
            other["probabilities"],
        )


@pytest.mark.slow
def test_a_report_is_written(folder: pathlib.Path) -> None:
    tiny.write_model(folder / "model", tiny.ROBERTA)
    for run in ("runs/text", f"runs/{NAME}", f"runs/{SWEEP_NAME}"):
        assert report.main([run]) == 0
        assert (folder / run / "report/report.html").is_file()
