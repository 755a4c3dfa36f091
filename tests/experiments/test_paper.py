"""`python -m experiments.paper` runs, continues, and reports on the runs that exist."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from experiments.paper import costs, directions, page, published, questions, result_cache
from experiments.paper.__main__ import main
from experiments.paper.configs import definitions, matrices, rank
from experiments.paper.configs import directions as directions_config
from experiments.paper.experiments import Task
from lora_jax.errors import LoraError
from lora_jax.report.document import Figure, Note, Panel, Paragraph, Report, Section, Table
from lora_jax.serving.served_adapters import BaseChoice
from lora_jax.training.config_json import to_dict
from tests.experiments import runs
from tests.report import browser, saved_runs

ROOT = pathlib.Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs/paper"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of runs of three experiments, with made-up scores."""
    path = tmp_path_factory.mktemp("paper")
    draw = np.random.default_rng(0)
    for name, config in (("matrices", matrices.config), ("rank", rank.config)):
        found = runs.members(config)
        scores = {m.name: tuple(draw.uniform(0.7, 0.8, 2).tolist()) for m in found}
        runs.write(path / name, found, scores)
    for member in runs.members(definitions.config):
        values = draw.uniform(3.0, 4.0, 2).tolist()
        one = path / "definitions" / member.name
        runs.finished(one, to_dict(member.config), *values, select="loss")
        if (member.config.lora.rank, *member.config.lora.targets) in definitions.CHOICES:
            summary = json.loads((one / "summary.json").read_text())
            summary["adapter_parameters"] = 345_600
            (one / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture(scope="module")
def written(folder: pathlib.Path) -> pathlib.Path:
    assert main(["--report-only", "--runs", str(folder)]) == 0
    return folder / "report"


def tables(path: pathlib.Path, *columns: str) -> list[list[list[str]]]:
    return [
        t[1:] for t in saved_runs.page(path / "report.html").tables if set(columns) <= set(t[0])
    ]


def test_seeds_are_one_line(folder: pathlib.Path, written: pathlib.Path) -> None:
    rows = {row[0]: row for row in tables(written, "matrices", "paper: MNLI")[0]}
    assert len(rows) == 10
    for member in runs.members(matrices.config):
        if member.config.seed == 0 and "rank=20" in member.name:
            name = member.name.split("targets=")[1].split(",")[0]
            files = sorted((folder / "matrices").glob(f"rank=20,*targets={name},*/summary.json"))
            found = [json.loads(f.read_text())["after"]["test"]["accuracy"] for f in files]
            assert len(found) == 3
            expected = f"{100 * np.mean(found):.1f} ± {100 * np.std(found, ddof=1):.1f}"
            assert rows[name[0]][4] == expected
            paper = published.MATRICES[(name,)]
            assert rows[name[0]][-2:] == [f"{value:.1f}" for value in paper]


def test_ranks_have_the_papers_beside_them(written: pathlib.Path) -> None:
    found, losses = tables(written, "r", "paper: WikiSQL", "seeds")[-1], tables(
        written, "paper: GPT-2 M loss"
    )[0]  # fmt: skip
    assert len(found) == 18
    paper = {tuple(row[:3]): row[-2:] for row in found}
    assert paper["q+v", "64", "16"] == paper["q+v", "64", "128"] == ["73.5", "91.4"]
    assert paper["q", "1", "2"] == ["68.8", "90.7"]
    assert {row[1]: row[-2] for row in losses} == {"1": "1.23", "6": "-", "8": "1.17", "64": "1.16"}


def test_a_budget_of_a_decoder_is_a_table_of_its_own(written: pathlib.Path) -> None:
    columns = ["matrices", "r", "trained", "validation", "test", "seeds"]
    (own,) = [t[1:] for t in saved_runs.page(written / "report.html").tables if t[0] == columns]
    assert [row[0] for row in own] == ["q", "v", "q+v", "q+k+v+o"]
    assert {row[2] for row in own} == {"345,601"}


def test_claims_have_the_papers_difference(written: pathlib.Path) -> None:
    rows = {row[0]: row[1] for row in tables(written, "difference", "paper", "ours")[0]}
    assert rows["q+v over q, one budget"] == "+3.3 WikiSQL, +0.3 MNLI"
    assert rows["rank 1 over rank 8, on q+v"] == "-0.4 WikiSQL, -0.3 MNLI"


def test_what_is_missing_is_a_note_with_its_command(written: pathlib.Path) -> None:
    text = (written / "report.md").read_text()
    for name in ("directions", "methods", "samples", "latency", "benefits"):
        assert f"python -m experiments.paper {name}" in text.replace("\\", ""), name
    assert "python -m experiments.paper rank" not in text.replace("\\", "")


def test_both_formats_hold_the_same(written: pathlib.Path) -> None:
    found = saved_runs.page(written / "report.html")
    assert found.tables == saved_runs.Markdown((written / "report.md").read_text()).tables


def test_nothing_at_all_is_an_error(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--report-only", "--runs", str(tmp_path)]) == 1
    assert "holds no run of any experiment" in " ".join(capsys.readouterr().err.split())


def test_another_name_is_an_error_with_the_nearest() -> None:
    with pytest.raises(LoraError, match="nearest:\n  matrices"):
        questions.chosen(["matrixes"], BaseChoice())
    assert [one.name for one in questions.chosen(["rank"], BaseChoice())] == ["rank"]


def test_outside_of_a_checkout_it_says_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["matrices"]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert "has no train.py and no experiments/paper/configs" in err
    assert not (tmp_path / "runs").exists()


def test_every_sweep_is_a_config_that_is_there() -> None:
    for experiment in questions.experiments(BaseChoice()):
        for task in experiment.tasks(pathlib.Path("runs/x")):
            if task.arguments[0] == "train.py":
                assert (ROOT / task.arguments[2].split(":")[0]).is_file(), task


def test_two_models_have_titles_and_pictures_of_their_own() -> None:
    section = Section(
        "Shared", (Figure("maps", (Panel("phi-ranks-1", "a map", None),)), Paragraph(""))
    )
    found = [directions._of(section, name, model) for name, model in directions.MODELS.items()]
    assert [one.title for one in found] == ["Shared: MiniLM", "Shared: SmolLM2"]
    report = Report("", "", "", (), tuple(found))
    assert [p.name for p in report.panels] == ["encoder-phi-ranks-1", "decoder-phi-ranks-1"]


def test_a_model_that_has_not_run_is_a_note(tmp_path: pathlib.Path) -> None:
    assert directions.sections(tmp_path, BaseChoice()) == []
    for member in runs.members(directions_config.encoder):
        runs.finished(tmp_path / "encoder" / member.name, to_dict(member.config), 0.7, 0.7)
    found = directions.sections(tmp_path, BaseChoice())
    assert [one.title.split(": ")[1] for one in found] == ["MiniLM", "MiniLM"]
    note = found[-1].blocks[-1]
    assert isinstance(note, Note)
    assert "no runs of decoder" in note.text
    assert "--config experiments/paper/configs/directions.py:decoder" in note.text


@pytest.fixture
def counting(tmp_path: pathlib.Path) -> Task:
    """A command that fails the first time and then succeeds, and that counts its runs."""
    script = tmp_path / "count.py"
    script.write_text(
        "import pathlib, sys\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "file.write_text(file.read_text() + 'x' if file.exists() else 'x')\n"
        "sys.exit(3 if file.read_text() == 'x' else 0)\n"
    )
    return Task(tmp_path / "left", (str(script), str(tmp_path / "times")))


def test_what_failed_runs_again_and_what_finished_does_not(
    counting: Task, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(LoraError, match="ended with status 3"):
        costs.run(counting, tmp_path)
    first = costs.read(counting.folder)
    assert first is not None and not first.finished
    assert costs.run(counting, tmp_path)
    second = costs.read(counting.folder)
    assert second is not None and second.finished
    assert second.seconds > first.seconds > 0
    assert second.peak_bytes > 2**20
    assert not costs.run(counting, tmp_path)
    assert (tmp_path / "times").read_text() == "xx"


def test_another_command_runs_and_starts_from_nothing(
    counting: Task, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "times").write_text("x")
    costs.run(counting, tmp_path)
    other = dataclasses.replace(counting, arguments=(*counting.arguments, "more"))
    assert costs.run(other, tmp_path)
    found = costs.read(counting.folder)
    assert found is not None and found.arguments[-1] == "more"
    assert (tmp_path / "times").read_text() == "xxx"


def test_a_damaged_cost_is_an_error(counting: Task, tmp_path: pathlib.Path) -> None:
    counting.folder.mkdir()
    (counting.folder / costs.FILE).write_text("{")
    with pytest.raises(LoraError, match="delete it"):
        costs.run(counting, tmp_path)


def test_list_says_what_is_done(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost = costs.Cost(("train.py",), 120.0, 200.0, 1, "a machine", True, "2026-01-01")
    costs._write(folder / "rank", cost)
    assert main(["rank", "--list", "--runs", str(folder)]) == 0
    assert "2.0" in capsys.readouterr().out
    experiments = questions.experiments(BaseChoice())
    found = page.make(experiments, result_cache.gather(experiments, folder, {})[0])
    how = found.sections[-1].blocks[0]
    assert isinstance(how, Table)
    assert how.rows[0][0] == "python train.py"
    (folder / "rank" / costs.FILE).unlink()


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.slow
@browser.NEEDED
def test_the_committed_page_is_drawn(width: int, tmp_path: pathlib.Path) -> None:
    found = browser.measured(COMMITTED / "report.html", width, tmp_path)
    assert found["width"] == width
    assert found["scrolls"] <= width
    assert found["loaded"] == []
    panels = (COMMITTED / "report.html").read_text().count('class="panel"')
    assert len(found["sizes"]) == panels > 12
    assert all(min(sizes) > 50 for sizes in found["sizes"])
    assert min(found["scales"]) > 0.75  # letters of 10 points have 10 pixels at least
    assert max(found["tables"]) <= width


@pytest.mark.slow
@browser.NEEDED
def test_the_committed_page_asks_for_nothing(tmp_path: pathlib.Path) -> None:
    assert (COMMITTED / "report.html").is_file()  # the browser's error page asks for nothing
    said, asked, _ = browser.opened(COMMITTED / "report.html", tmp_path)
    assert "CONSOLE" not in said
    assert asked == []


def test_the_committed_formats_hold_the_same() -> None:
    found = saved_runs.page(COMMITTED / "report.html")
    plain = saved_runs.Markdown((COMMITTED / "report.md").read_text())
    assert found.tables == plain.tables
    assert plain.images == []
    assert {file.name for file in COMMITTED.iterdir()} == {
        "report.html",
        "report.md",
        "report.json",
    }
