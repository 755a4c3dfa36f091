"""`lora-jax report`: the contents of its files, and that both formats say the same."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import xml.etree.ElementTree as xml
from collections.abc import Sequence

import matplotlib.image
import numpy as np
import pytest

import lora_jax
from lora_jax import models
from lora_jax.cli.report import main
from lora_jax.report import single_run
from lora_jax.training.config_json import to_dict
from lora_jax.training.sizes import in_units
from lora_jax.training.summary import costs
from tests.report import browser, saved_runs
from tests.report.conftest import Written, of_rank

BOTH = pytest.mark.parametrize("which", ["solo", "sweep"])


def folder(written: Written, which: str) -> pathlib.Path:
    return getattr(written, which) / "report"


def table(path: pathlib.Path, *columns: str) -> list[list[str]]:
    """Return the rows below the header of the table that has these columns."""
    for found in saved_runs.page(path / "report.html").tables:
        if set(columns) <= set(found[0]):
            return found[1:]
    raise AssertionError(f"no table with {columns}")


def column(path: pathlib.Path, name: str, *others: str) -> list[str]:
    for found in saved_runs.page(path / "report.html").tables:
        if {name, *others} <= set(found[0]):
            return [row[found[0].index(name)] for row in found[1:]]
    raise AssertionError(f"no column {name}")


def numbers(texts: Sequence[str]) -> list[float]:
    return [float(text.replace(",", "").rstrip("%")) for text in texts]


@BOTH
def test_both_formats_hold_the_same(written: Written, which: str) -> None:
    path = folder(written, which)
    page, plain = (
        saved_runs.page(path / "report.html"),
        saved_runs.Markdown((path / "report.md").read_text()),
    )
    assert len(page.tables) >= 5
    assert page.tables == plain.tables
    assert [[*fact, ""][:3] for fact in page.facts] == plain.facts
    assert page.alternatives == [saved_runs._read(text) for text, _ in plain.images]
    text = saved_runs._read(re.sub(r"\\(.)", r"\1", (path / "report.md").read_text()))
    for paragraph in page.paragraphs:
        assert " ".join(paragraph.split()) in text, paragraph


@BOTH
def test_every_figure_is_there_as_png_and_svg(written: Written, which: str) -> None:
    path = folder(written, which)
    images = [name for _, name in saved_runs.Markdown((path / "report.md").read_text()).images]
    assert len(images) == len(set(images)) >= 6
    assert {p.name for p in path.iterdir()} == {
        *("report.html", "report.md"),
        *images,
        *(name.replace(".png", ".svg") for name in images),
    }
    for name in images:
        pixels = matplotlib.image.imread(path / name)
        assert min(pixels.shape[:2]) > 200, name
        assert len(np.unique(pixels[::3, ::3, :3])) > 10, name
        drawn = xml.fromstring((path / name.replace(".png", ".svg")).read_text())
        assert len(list(drawn.iter("{http://www.w3.org/2000/svg}path"))) > 10, name


@BOTH
def test_the_page_needs_nothing_but_itself(written: Written, which: str) -> None:
    """The page loads nothing else, and each id occurs once: figures share no clip path."""
    path = folder(written, which) / "report.html"
    page, text = saved_runs.page(path), path.read_text()
    assert not {"script", "iframe", "object", "embed", "base", "img"} & set(page.tags)
    assert not [x for x in page.references if not x.startswith(("#", "data:"))]
    assert "@import" not in text
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", text)
    assert len(page.ids) == len(set(page.ids))
    inner = {x[1:] for x in page.references if x.startswith("#")}
    assert inner <= set(page.ids) and len(inner) > 50


def test_the_numbers_of_a_run_are_its_summary(written: Written) -> None:
    path, summary = folder(written, "solo"), json.loads((written.solo / "summary.json").read_text())
    expected = [
        [split, name, f"{old:.4f}", f"{summary['after'][split][name]:.4f}"]
        for split, scores in summary["before"].items()
        for name, old in scores.items()
    ]
    assert [row[:4] for row in table(path, "split", "before", "after")] == expected
    facts = {fact[0]: fact[1:] for fact in saved_runs.page(path / "report.html").facts}
    before, after = (summary[when]["validation"]["accuracy"] for when in ("before", "after"))
    assert facts["validation accuracy"][0] == f"{before:.4f} → {after:.4f}"
    trained = summary["adapter_parameters"] + summary["trainable_parameters"]
    assert facts["trained parameters"][0] == f"{trained:,}"
    assert facts["adapter on disk"][0] == in_units(summary["adapter_file_bytes"])
    assert f"{summary['steps_per_second']:.2f} steps/s" == facts["speed"][0]
    cells = saved_runs.page(path / "report.html").tables[-1]
    assert [list(row) for row in costs(summary)] == cells[1 : len(costs(summary)) + 1]


def test_the_first_lines_say_what_the_run_is_worth(written: Written) -> None:
    page = saved_runs.page(folder(written, "solo") / "report.html")
    summary = json.loads((written.solo / "summary.json").read_text())
    first = page.paragraphs[2]  # after the kind and the title
    before, after = (summary[when]["validation"]["accuracy"] for when in ("before", "after"))
    what = "better than" if after > before else "no better than"
    assert first.startswith(f"This adapter is {what} the base by {abs(after - before):.4f}")
    assert in_units(summary["adapter_file_bytes"]) in first
    assert f"{written.solo} --text TEXT" in (folder(written, "solo") / "report.html").read_text()


def test_a_lower_loss_is_better_and_a_lower_accuracy_is_not(written: Written) -> None:
    summary = json.loads((written.solo / "summary.json").read_text())
    for name, better, says in (("loss", "lower", " better"), ("accuracy", "higher", " no better")):
        scores = {"before": {"test": {name: 0.75}}, "after": {"test": {name: 0.5}}}
        made = single_run.verdict({**summary, **scores, "select": name, "better": better})
        assert f"is{says} than the base by 0.2500: test {name} 0.7500 → 0.5000" in made


def test_guesses_are_counted_by_class(written: Written) -> None:
    """The classes' examples are all examples, and their right guesses are the accuracy."""
    summary = json.loads((written.solo / "summary.json").read_text())
    rows = table(folder(written, "solo"), "class", "examples", "recall")
    own, recall = numbers([row[1] for row in rows]), [row[4] for row in rows]
    right = sum(x * float(y) for x, y in zip(own, recall, strict=True) if y != "-")
    assert right / sum(own) == pytest.approx(summary["after"]["validation"]["accuracy"], abs=1e-3)


@pytest.mark.usefixtures("undrawn")
def test_both_log_probabilities_may_fall(written: Written, tmp_path: pathlib.Path) -> None:
    """A run on preferences has a note under its curves; another run has none."""
    said = "may both fall"
    saved_runs.record(tmp_path / "run", written.solo, to_dict(written.config), 0.5)
    assert main([str(tmp_path / "run")]) == 0
    assert said not in (tmp_path / "run/report/report.html").read_text()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "split": "validation", "loss": 0.6, "logps/chosen": -9.0}\n')
    assert main([str(tmp_path / "run")]) == 0
    assert said in (tmp_path / "run/report/report.html").read_text()


def test_settings_are_those_that_are_no_default(written: Written) -> None:
    """Settings at their defaults are not shown, except a few."""
    rows = {row[0]: row[1:] for row in table(folder(written, "solo"), "field", "lora_jax's own")}
    assert rows["data.max_length"] == ["16", "128"]
    assert rows["lora.rank"] == ["4", "8"]
    assert rows["seed"] == ["0", "0"]
    assert rows["model.reference"] == [written.config.model.reference, "-"]
    assert not {"optimizer.b1", "model.dropout", "run_dir", "accumulate"} & set(rows)


def test_the_update_against_matrices_that_are_formed(written: Written) -> None:
    """Spectrum and Table 7 are computed again from `a @ b` and W; the layers are in a stack."""
    path = folder(written, "solo")
    layout, adapters, _ = lora_jax.restore(written.solo / "adapters/best")
    source = models.open(written.config.model.reference)
    weights = source.load(dataclasses.replace(source.config, scan_layers=True))
    params = lora_jax.paths.flatten({"bert": weights})
    rows = table(path, "layer", "effective rank"), table(path, "layer", "factor")
    there = [(layer, target) for layer in range(2) for target in layout.targets]
    assert len(rows[0]) == len(rows[1]) == len(there) == 4
    for (layer, target), spectrum, table7 in zip(there, *rows, strict=True):
        assert spectrum[0] == table7[0] == str(layer)
        assert f"layers/attention/{spectrum[1]}/kernel" in target.path
        a, b, w = (
            np.asarray(x[layer], np.float64) for x in (*adapters[target.path], params[target.path])
        )
        update = target.scale * a @ b
        u, s, vt = np.linalg.svd(update)
        own, r = np.linalg.svd(w)[1], target.rank
        shares = s[:r] / s.sum()
        expected = [np.exp(-(shares * np.log(shares)).sum()), s[0], np.linalg.norm(update)]
        np.testing.assert_allclose(numbers(spectrum[4:7]), expected, rtol=2e-3)
        along = np.linalg.norm(u[:, :r].T @ w @ vt[:r].T)
        expected = [np.linalg.norm(w), np.linalg.norm(update), along, np.linalg.norm(own[:r])]
        expected += [r * np.linalg.norm(w) / 16, np.linalg.norm(update) / along]
        np.testing.assert_allclose(numbers(table7[3:]), expected, rtol=2e-2)
    assert sum(numbers([row[-1] for row in rows[0]])) == pytest.approx(100, abs=0.3)


def test_a_sweep_has_the_best_first(written: Written) -> None:
    path = folder(written, "sweep")
    assert numbers(column(path, "validation accuracy", "rank", "seed")) == [0.75, 0.625, 0.5]
    facts = {fact[0]: fact[1:] for fact in saved_runs.page(path / "report.html").facts}
    assert facts["best of 3 runs"][0] == "seed 0, rank 4"
    assert facts["validation accuracy"][0].endswith("→ 0.7500")
    assert "This is the update of adapters/best of r4." in (path / "report.md").read_text()


def test_shared_directions_against_matrices_that_are_formed(written: Written) -> None:
    pairs = [("r2", "r4"), ("r4", saved_runs.HOSTILE)]
    tables = [t for t in saved_runs.page(folder(written, "sweep") / "report.html").tables
              if "random" in t[0] and "mean" in t[0]]  # fmt: skip
    assert len(tables) == 2
    for names, found in zip(pairs, tables, strict=True):
        layout, one, _ = lora_jax.restore(written.sweep / names[0] / "adapters/best")
        _, two, _ = lora_jax.restore(written.sweep / names[1] / "adapters/best")
        for row in found[1:]:
            paths = [t.path for t in layout.targets if f"/{row[0]}/" in t.path]
            formed = {"A": lambda f: f.a, "ΔW": lambda f: np.asarray(f.a) @ np.asarray(f.b)}[row[1]]
            tops = [[np.linalg.svd(np.asarray(formed(x[p]), np.float64))[0][:, 0]
                     for x in (one, two)] for p in paths]  # fmt: skip
            phi = [float(u @ v) ** 2 for u, v in tops]
            expected = [np.mean(phi), min(phi), max(phi)]
            np.testing.assert_allclose(numbers(row[2:5]), expected, atol=6e-4)
            assert row[5] == f"{sum(p > 0.5 for p in phi)} of 2"
            assert float(row[6]) == pytest.approx(1 / 16, abs=1e-4)
    text = (folder(written, "sweep") / "report.md").read_text()
    images = [name for _, name in saved_runs.Markdown(text).images]
    maps = ["ranks-1", "ranks-2", "ranks-1-zoomed", "ranks-2-zoomed"]
    maps += ["seeds-1", "seeds-2", "seeds-random"]
    assert [name for name in images if name.startswith("phi-")] == [f"phi-{m}.png" for m in maps]


def test_hostile_names_are_text(written: Written) -> None:
    """A hostile name is shown as text."""
    path = folder(written, "sweep")
    page = saved_runs.page(path / "report.html")
    assert "b" not in page.tags
    assert any(saved_runs.HOSTILE in text for text in page.paragraphs)
    assert "<b>" not in (path / "report.md").read_text()
    assert r"&lt;b&gt;&amp;\_x\_\|\`$" in (path / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_run_under_way_is_shown_as_far_as_it_is(
    written: Written, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(written.solo, run, ignore=shutil.ignore_patterns("summary.json", "report"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:10])  # killed as it wrote
    assert main([str(run)]) == 0
    assert "has not finished" in capsys.readouterr().err
    page = saved_runs.page(run / "report/report.html")
    assert any("has not finished" in text for text in page.paragraphs)
    assert table(run / "report", "split", "before")
    assert table(run / "report", "layer", "effective rank")
    shutil.rmtree(run / "adapters")
    shutil.rmtree(run / "report")
    (run / "metrics.jsonl").unlink()
    assert main([str(run)]) == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "has not exported one yet" in err
    assert "No evaluation has been made yet" in err


@pytest.mark.usefixtures("undrawn")
def test_a_base_that_cannot_be_had_is_said(
    written: Written, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(written.solo), "--out", str(tmp_path), "--base", str(tmp_path / "none")]
    assert main(arguments) == 0
    assert "cannot be opened here" in capsys.readouterr().err
    page = saved_runs.page(tmp_path / "report.html")
    assert any("cannot be opened here" in text for text in page.paragraphs)
    assert not any("factor" in found[0] for found in page.tables)
    assert table(tmp_path, "layer", "effective rank")


@pytest.mark.usefixtures("undrawn")
def test_members_that_have_not_finished(written: Written, tmp_path: pathlib.Path) -> None:
    group = tmp_path / "group"
    ignore = shutil.ignore_patterns("report")
    shutil.copytree(written.sweep, group, ignore=ignore)
    (group / "r2/summary.json").unlink()
    (group / "r2/error.txt").write_text("r2 stops: step 2 is not finite\n")
    assert main([str(group)]) == 0
    rows = {row[0]: row[1:] for row in table(group / "report", "run", "state")}
    assert rows["r2"][-1] == "r2 stops: step 2 is not finite"
    assert rows["r4"][-1] == "finished"
    for name in ("r4", saved_runs.HOSTILE):
        (group / name / "summary.json").unlink()
    assert main([str(group), "--out", str(tmp_path / "none")]) == 0
    assert saved_runs.page(tmp_path / "none/report.html").facts[0][:2] == ["runs", "3"]


@pytest.mark.usefixtures("undrawn")
def test_tasks_have_a_picture_each_and_no_best(written: Written, tmp_path: pathlib.Path) -> None:
    for name in ("one", "two"):
        config = to_dict(of_rank(written.config, 4, 0))
        config["data"]["source"] = name
        saved_runs.record(tmp_path / "tasks" / name, written.solo, config, 0.7)
    assert main([str(tmp_path / "tasks")]) == 0
    path = tmp_path / "tasks/report"
    assert [row[0] for row in table(path, "task")] == ["one", "two"]
    assert {"results-1.png", "results-2.png"} <= {p.name for p in path.iterdir()}
    assert [fact[0] for fact in saved_runs.page(path / "report.html").facts[:2]] == ["one", "two"]


@pytest.mark.usefixtures("undrawn")
def test_runs_given_one_by_one(
    written: Written, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(written.sweep / name) for name in ("r2", "r4")]
    assert main(runs) == 1
    assert "--out DIR" in capsys.readouterr().err
    assert main([*runs, "--out", str(tmp_path)]) == 0
    assert column(tmp_path, "rank", "trained") == ["4", "2"]
    page = saved_runs.page(tmp_path / "report.html")
    assert page.paragraphs[:2] == ["LoRA runs", "r2, r4"]
    assert "Validation loss of 2 runs over the steps" in page.alternatives
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "summary.json is not JSON"),
        ("[]", "summary.json holds a list, expected an object"),
        ("{}", "has no 'steps'"),
        ({"adapter_file_bytes": "many"}, "'adapter_file_bytes' is 'many'"),
        ({"confusion": {"test": [[1, 2]]}}, "'confusion' is no square of counts"),
        ({"after": {"test": 3}}, "'after' holds values other than numbers"),
    ],
)
def test_a_broken_summary_is_an_error_with_a_cure(
    content: str | dict[str, object],
    says: str,
    written: Written,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(written.solo / name, tmp_path)
    if isinstance(content, dict):
        whole = json.loads((written.solo / "summary.json").read_text())
        content = json.dumps(whole | content)
    (tmp_path / "summary.json").write_text(content)
    assert main([str(tmp_path)]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert says in err
    assert "delete it and start the command of the run again" in err
    assert "Traceback" not in err


def test_what_is_no_run_is_an_error(
    written: Written, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pathlib.Path(written.config.model.reference)
    for path, says in (
        (tmp_path / "none", "there is no such directory"),
        (tmp_path, "has nothing; expected config.json"),
        (model, "is not a run directory of train.py"),  # it has a config.json, of another kind
        (written.solo / "summary.json", "it is a file"),
    ):
        assert main([str(path)]) == 1
        assert says in " ".join(capsys.readouterr().err.split())
    assert main([]) == 1
    assert "no run directory" in capsys.readouterr().err
    assert not (model / "report").exists()


@pytest.mark.slow
@browser.NEEDED
@BOTH
@pytest.mark.parametrize("width", [390, 1280])
def test_all_is_drawn_and_nothing_wider_than_the_window(
    written: Written, which: str, width: int, tmp_path: pathlib.Path
) -> None:
    page = folder(written, which) / "report.html"
    found = browser.measured(page, width, tmp_path)
    assert found["width"] == width
    assert found["scrolls"] <= width
    assert found["loaded"] == []
    assert len(found["sizes"]) == len(saved_runs.page(page).alternatives)
    for size in found["sizes"]:
        assert min(size) > 80
    assert min(found["scales"]) > 0.75  # letters of 10 points have 10 pixels at least
    assert max(found["tables"]) <= width
    assert not found["cut"]


@pytest.mark.slow
@browser.NEEDED
@BOTH
def test_it_opens_without_a_word_and_without_a_request(
    written: Written, which: str, tmp_path: pathlib.Path
) -> None:
    """The page makes no request: its policy forbids loads, and the console reports each attempt."""
    said, asked, shot = browser.opened(folder(written, which) / "report.html", tmp_path)
    assert "CONSOLE" not in said
    assert asked == []
    pixels = matplotlib.image.imread(shot)
    assert pixels.shape[:2] == (2000, 1400)
    assert len(np.unique(pixels[..., :3])) > 50
