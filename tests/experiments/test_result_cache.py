"""A report keeps its sections on experiments whose runs are no longer here."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

from experiments.paper import page, questions, result_cache
from experiments.paper.__main__ import main
from experiments.paper.configs import matrices, rank
from experiments.shared import page_files
from lora_jax.errors import LoraError
from lora_jax.serving.served_adapters import BaseChoice
from tests.experiments import runs
from tests.report import saved_runs

COMMITTED = pathlib.Path(__file__).resolve().parents[2] / "docs/paper"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of runs of two experiments with made-up scores, and of their report."""
    path = tmp_path_factory.mktemp("paper")
    for number, (name, config) in enumerate((("matrices", matrices), ("rank", rank))):
        found = runs.members(config.config)
        scores = {m.name: (0.7, 0.7 + (i + number) / 999) for i, m in enumerate(found)}
        runs.write(path / name, found, scores)
    assert main(["--report-only", "--runs", str(path), "--out", str(path / "whole")]) == 0
    return path


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_without_the_runs_the_report_is_the_same(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "whole", tmp_path / "out")
    (tmp_path / "none").mkdir()
    arguments = ["--report-only", "--runs", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert files(tmp_path / "out") == files(folder / "whole")
    assert "no runs of matrices, rank" in " ".join(capsys.readouterr().err.split())


def test_runs_go_before_what_is_kept(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(folder / "whole", tmp_path / "out")
    found = runs.members(matrices.config)
    runs.write(tmp_path / "runs/matrices", found, {m.name: (0.9, 0.9) for m in found})
    arguments = ["--report-only", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    old, new = (
        saved_runs.page(path / "report.html") for path in (folder / "whole", tmp_path / "out")
    )
    assert new.facts[0] == old.facts[0] == ["runs", "84", "in 2 experiments"]
    assert new.facts[2][1] == "90.0 ± 0.0 %" != old.facts[2][1]
    assert new.facts[3] == old.facts[3]
    claims, _, ranks, _ = new.tables
    assert [row[2] for row in claims[1:5]] == ["+0.0 ± 0.0"] * 4
    assert claims[5:] == old.tables[0][5:]
    assert ranks == old.tables[2]


@pytest.mark.parametrize("damage", ["{", "[]", '{"rank": {"runs": 3}}'])
def test_what_cannot_be_read_is_an_error_and_stays(
    damage: str, folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "whole", tmp_path / "out")
    (tmp_path / "out" / result_cache.FILE).write_text(damage)
    before = files(tmp_path / "out")
    arguments = ["--report-only", "--runs", str(folder), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "cannot be read" in " ".join(capsys.readouterr().err.split())
    assert files(tmp_path / "out") == before


def test_a_figure_or_a_page_that_is_gone_is_an_error(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(folder / "whole", tmp_path / "out")
    page = tmp_path / "out/report.html"
    page.write_text(page.read_text().replace('id="ranks-ours"', 'id="ranks"'))
    with pytest.raises(LoraError, match=r"ranks-ours.*git checkout"):
        result_cache.read(tmp_path / "out")
    page.unlink()
    with pytest.raises(LoraError, match=r"report\.html.*git checkout"):
        result_cache.read(tmp_path / "out")


def test_the_committed_page_is_what_is_kept_of_it(tmp_path: pathlib.Path) -> None:
    """docs/paper is made again, byte for byte, from its own report.json and its page's figures."""
    found = result_cache.read(COMMITTED)
    assert set(found) == set(questions.NAMES)
    made = page.make(questions.experiments(BaseChoice()), found)
    page_files.write(made, tmp_path)
    result_cache.write(found, tmp_path)
    assert files(tmp_path) == files(COMMITTED)
    assert json.loads((COMMITTED / result_cache.FILE).read_text())["rank"]["runs"] == 54
