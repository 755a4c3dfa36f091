"""The results of a group: the table, and the files."""

from __future__ import annotations

import csv
import io
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from configs import minilm_reviews
from lora_jax.sweeps import plots, results
from lora_jax.sweeps.comparison import gather
from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.training.config import Config
from lora_jax.training.config_json import to_dict

Score = Callable[[Config], float]


def left_behind(folder: pathlib.Path, name: str, config: Config, score: float) -> dict[str, Any]:
    """Write the files of a finished run that the results read; return its summary."""
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(to_dict(config)))
    curve = [(0, 0.5), (50, (0.5 + score) / 2), (100, score)]
    lines = [{"step": s, "split": "validation", "loss": 1 - v, "accuracy": v} for s, v in curve]
    lines.append({"step": 100, "split": "test", "loss": 0.1, "accuracy": 0.9})
    lines.insert(0, {"step": 1, "loss": 2.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "run": str(path),
        "steps": 100,
        "select": "accuracy",
        "better": "higher",
        "adapter_parameters": 1000,
        "trainable_parameters": 24,
        "before": {
            "validation": {"accuracy": 0.5, "loss": 0.7},
            "test": {"accuracy": 0.52, "loss": 0.7},
        },
        "after": {
            "validation": {"accuracy": score, "loss": 1 - score},
            "test": {"accuracy": score - 0.01, "loss": 1 - score},
        },
        "best_step": 100,
    }


def finished(folder: pathlib.Path, grid: dict[str, Any], score: Score) -> list[dict[str, Any]]:
    group = SweepConfig(base=minilm_reviews.config, grid=grid).expand()
    return [left_behind(folder, m.name, m.config, score(m.config)) for m in group.members]


def by_rank_and_rate(config: Config) -> float:
    """Return a score that is best at rank 4 and a rate of 1e-3."""
    rate = abs(math.log10(config.optimizer.learning_rate) + 3)
    return 0.8 - 0.05 * rate - 0.01 * abs(config.lora.rank - 4)


RANKS = {"lora.rank": (1, 4, 8), "optimizer.learning_rate": (1e-4, 1e-3, 1e-2)}


@pytest.fixture
def swept(tmp_path: pathlib.Path) -> list[dict[str, Any]]:
    return finished(tmp_path, RANKS, by_rank_and_rate)


def shown(summaries: list[dict[str, Any]]) -> list[str]:
    screen = io.StringIO()
    results.show(summaries, Console(file=screen, width=140))
    return screen.getvalue().splitlines()


def test_what_differs_and_what_is_best(swept: list[dict[str, Any]]) -> None:
    found = gather(swept)
    assert found.varied == ("lora.rank", "optimizer.learning_rate")
    assert not found.tasks
    assert found.best is not None
    assert found.best.values == {"lora.rank": 4, "optimizer.learning_rate": 1e-3}
    assert found.best.curve == ((0, 0.5), (50, 0.65), (100, 0.8))
    assert found.splits == ("validation", "test")


def test_where_less_is_better_the_least_is_best(swept: list[dict[str, Any]]) -> None:
    turned = [{**s, "select": "loss", "better": "lower"} for s in swept]
    best = gather(turned).best
    assert best is not None
    assert best.name == "rank=4,learning_rate=1e-3"


def test_a_score_that_is_not_a_number_is_the_worst(swept: list[dict[str, Any]]) -> None:
    for value in (math.nan, None):
        swept[4]["after"]["validation"]["accuracy"] = value
        best = gather(swept).best
        assert best is not None
        assert best.name != "rank=4,learning_rate=1e-3"
        assert "-" in shown(swept)[-1].split()[2]


def test_the_table_has_the_best_first(swept: list[dict[str, Any]]) -> None:
    _, head, *rows = (line.split() for line in shown(swept))
    assert head[:3] == ["rank", "learning_rate", "validation"] and head[-1] == "trained"
    assert rows[0][:4] == ["4", "1e-3", "0.8000", "0.7900"]
    assert rows[0][-1] == "1,024"
    assert len(rows) == 9
    scores = [float(row[2]) for row in rows]
    assert scores == sorted(scores, reverse=True)


def test_the_files_hold_every_member(swept: list[dict[str, Any]], tmp_path: pathlib.Path) -> None:
    results.write(tmp_path, swept)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["best"] == "rank=4,learning_rate=1e-3"
    assert found["varied"] == ["lora.rank", "optimizer.learning_rate"]
    assert [m["after"] for m in found["members"]] == [s["after"] for s in swept]
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [pathlib.Path(s["run"]).name for s in swept]
    assert lines[4]["lora.rank"] == "4"
    assert float(lines[4]["optimizer.learning_rate"]) == 1e-3
    assert float(lines[4]["after.validation.accuracy"]) == 0.8
    assert matplotlib.image.imread(tmp_path / "results.png").shape[0] > 300
    assert not list(tmp_path.glob("*.tmp"))


def test_the_picture_has_a_line_for_each_rank(swept: list[dict[str, Any]]) -> None:
    figure = plots.figure_of(gather(swept))
    validation, test = figure.axes
    lines = {line.get_label(): line for line in validation.get_lines()}
    assert list(lines) == ["rank 1", "rank 4", "rank 8", "best"]
    np.testing.assert_allclose(
        lines["rank 4"].get_xydata(), [[1e-4, 0.75], [1e-3, 0.8], [1e-2, 0.75]]
    )
    assert lines["best"].get_xydata().tolist() == [[1e-3, 0.8]]
    assert validation.get_xscale() == "log"
    assert [t.get_text() for t in validation.get_xticklabels()] == ["1e-4", "1e-3", "0.01"]
    assert test.get_title() == "test"


def test_over_seeds_the_mean_is_drawn(tmp_path: pathlib.Path) -> None:
    grid = {"lora.rank": (1, 4), "seed": (0, 1, 2)}
    summaries = finished(tmp_path, grid, lambda c: 0.7 + 0.01 * c.seed + 0.01 * c.lora.rank)
    figure = plots.figure_of(gather(summaries))
    (line, _) = figure.axes[0].get_lines()
    np.testing.assert_allclose(line.get_xydata(), [[1, 0.72], [4, 0.75]])


def test_where_nothing_is_a_number_there_is_a_dot_each(tmp_path: pathlib.Path) -> None:
    grid = {"lora.init": ("gaussian", "uniform"), "lora.targets": (("a",), ("b", "c"))}
    summaries = finished(tmp_path, grid, lambda config: 0.7 + len(config.lora.targets) / 10)
    figure = plots.figure_of(gather(summaries))
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert len(labels) == 4
    assert labels[-1].endswith("targets=b+c")
    results.write(tmp_path, summaries)
    assert "b c" in (tmp_path / "results.csv").read_text()


def test_tasks_have_a_panel_each_and_none_is_best(tmp_path: pathlib.Path) -> None:
    grid = {"data.source": ("reviews", "reuters8", "newsgroups")}
    summaries = finished(tmp_path, grid, lambda config: 0.7)
    found = gather(summaries)
    assert found.tasks
    assert found.best is None
    figure = plots.figure_of(found)
    assert [a.get_title() for a in figure.axes] == [
        f"{row.name}\ntest 0.5200 → 0.6900" for row in found.rows
    ]
    text = "\n".join(shown(summaries))
    assert "3 tasks: accuracy before -> after training" in text
    summaries[1]["select"] = "loss"
    assert "source=reuters8 (loss)" in "\n".join(shown(summaries))
    assert "0.5000 -> 0.7000" in text
    assert "0.5200 -> 0.6900" in text


def test_runs_without_any_evaluation(tmp_path: pathlib.Path) -> None:
    summaries = finished(tmp_path, RANKS, by_rank_and_rate)
    for summary in summaries:
        summary.update({"before": {}, "after": {}, "best_step": None})
    results.write(tmp_path, summaries)
    assert gather(summaries).best is None
    assert len(shown(summaries)) == 2 + 9


def test_runs_that_only_their_names_tell_apart(tmp_path: pathlib.Path) -> None:
    twice = [left_behind(tmp_path, name, minilm_reviews.config, 0.7) for name in ("one", "other")]
    found = results.listing(gather(twice))
    assert found.columns[0] == "run"
    assert [row[0] for row in found.rows] == ["one", "other"]


def test_each_panel_alone_is_the_panel_of_the_picture(
    swept: list[dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    found = gather(swept)
    together = plots.figure_of(found).axes
    alone = plots.figures_of(found)
    assert [name for name, _ in alone] == ["validation", "test"]
    for (name, figure), panel in zip(alone, together, strict=True):
        (axis,) = figure.axes
        assert axis.get_title() == panel.get_title() == name
        for one, other in zip(axis.get_lines(), panel.get_lines(), strict=True):
            assert one.get_label() == other.get_label()
            np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())
    inner = tmp_path / "inner"
    inner.mkdir()
    bars = finished(inner, {"lora.init": ("gaussian", "uniform")}, lambda config: 0.7)
    assert [name for name, _ in plots.figures_of(gather(bars))] == ["all runs"]
