"""Whole runs with other kinds of update and on quantised bases: they are resumed, served and swept.

A run takes seconds to trace and compile, so tests that ask for the same run share it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lora_jax
from lora_jax.bases.recipe import ABOUT, BEGUN
from lora_jax.checkpoint.adapter import restore_about
from lora_jax.cli import generate, predict, report
from lora_jax.sweeps.config import GroupConfig, Member
from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.system import whole_files
from lora_jax.training import directory
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.classification import classification
from lora_jax.training.config import LoraConfig
from lora_jax.training.config_json import to_dict
from lora_jax.training.text import ModelConfig
from tests.training import tiny
from tests.training.runs import assert_same_run, train_group, train_in
from tests.training.test_text import text_config

pytestmark = pytest.mark.slow

QV = ("**/attention/{query,value,q,v}/kernel",)
Trained = Callable[[Any], tuple[pathlib.Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "llama", tiny.LLAMA)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a function that trains a config once, and returns the run's folder and summary."""
    runs: dict[str, tuple[pathlib.Path, dict[str, Any]]] = {}

    def run(config: Any) -> tuple[pathlib.Path, dict[str, Any]]:
        described = to_dict(config)
        name = json.dumps(described, sort_keys=True)
        if name not in runs:
            path = tmp_path_factory.mktemp("run")
            whole_files.write_json(path / "config.json", described)
            summary = train_in(path, config)
            directory.finish(path, summary)
            runs[name] = path, summary
        return runs[name]

    return run


def config_of(workload: Any, weights: pathlib.Path, source: str, **changes: Any) -> Any:
    """Return the config of a run of 6 steps with checkpoints at 3 and 6."""
    model = ModelConfig(str(weights), **changes.pop("model", {}))
    lora = LoraConfig(2, 4.0, QV, **changes.pop("lora", {}))
    fast = {"steps": 6, "evaluate_every": 3, "checkpoint_every": 3}
    return text_config(workload, weights, source, model=model, lora=lora, **fast, **changes)


def assert_goes_on(path: pathlib.Path, config: Any, again: pathlib.Path) -> None:
    """Assert that a run that starts again from its middle checkpoint ends with the same bits."""
    shutil.copytree(path, again)
    for later in ("adapters/last", "checkpoints/6"):
        shutil.rmtree(again / later)
    (again / "summary.json").unlink()
    train_in(again, config)
    assert_same_run(path, again, 6)


def assert_predicts(run: pathlib.Path, summary: dict[str, Any], source: str) -> None:
    """Assert that predict is right as often as the evaluation in training."""
    file, out = source.replace("{split}", "validation"), run / "out.jsonl"
    assert predict.main(["--file", file, "--out", str(out), "--adapter", str(run)]) == 0
    right = [str(row["prediction"]) == str(row["label"]) for row in texts(out)]
    assert np.mean(right) == pytest.approx(summary["after"]["validation"]["accuracy"])


def texts(path: pathlib.Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Orbax warns that it takes the sharding from the file.
without_warning = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@without_warning
@pytest.mark.parametrize(("kind", "scheme"), [("dora", "nf4"), ("vera", "none")])
def test_a_run_of_each_kind(
    kind: str,
    scheme: str,
    roberta: pathlib.Path,
    source: str,
    trained: Trained,
    tmp_path: pathlib.Path,
) -> None:
    """Each kind of update trains; DoRA, which saves the most, is also resumed and served."""
    config = kind_config(kind, scheme, roberta, source)
    run, summary = trained(config)
    assert summary["merged_difference"] is None or summary["merged_difference"] < 1e-5
    assert (summary["merged_difference"] is None) == (scheme != "none")
    layout = lora_jax.restore(run / "adapters/last").layout
    assert {(t.kind, t.scaling) for t in layout.targets} == {(kind, "alpha/sqrt(r)")}
    assert (ABOUT in restore_about(run / "adapters/best")) == (scheme != "none")
    if kind == "dora":
        assert_goes_on(run, config, tmp_path / "again")
        assert_predicts(run, summary, source)


def kind_config(kind: str, scheme: str, roberta: pathlib.Path, source: str) -> Any:
    lora, model = {"kind": kind, "scaling": "alpha/sqrt(r)"}, {"quantize": scheme}
    return config_of(classification, roberta, source, lora=lora, model=model)


def test_a_report_of_dora_on_a_quantised_base(
    roberta: pathlib.Path, source: str, trained: Trained
) -> None:
    run, _ = trained(kind_config("dora", "nf4", roberta, source))
    assert report.main([str(run)]) == 0
    text = (run / "report/report.html").read_text()
    assert "Amplified directions of W" in text and "cannot be analysed" not in text


def test_lokr_predicts_as_it_was_evaluated(
    roberta: pathlib.Path, source: str, trained: Trained
) -> None:
    run, summary = trained(config_of(classification, roberta, source, lora={"kind": "lokr"}))
    assert ABOUT not in restore_about(run / "adapters/best")
    assert_predicts(run, summary, source)


@without_warning
def test_a_run_with_dropout_goes_on(
    roberta: pathlib.Path, source: str, trained: Trained, tmp_path: pathlib.Path
) -> None:
    """A run with dropout is resumed exactly, as its masks depend on the step alone."""
    config = config_of(classification, roberta, source, lora={"dropout": 0.5})
    run, summary = trained(config)
    assert_goes_on(run, config, tmp_path / "again")
    _, plain = trained(config_of(classification, roberta, source))
    assert summary["before"] == plain["before"]
    assert summary["merged_difference"] < 1e-5
    assert summary["after"]["validation"]["loss"] != plain["after"]["validation"]["loss"]


def test_a_run_on_a_quantised_base_writes(
    two_layers: pathlib.Path, source: str, trained: Trained, tmp_path: pathlib.Path
) -> None:
    scanned = {"scan_layers": True}
    config = config_of(causal_lm, two_layers, source, model=scanned | {"quantize": "nf4"})
    run, summary = trained(config)
    _, plain = trained(config_of(causal_lm, two_layers, source, model=scanned))
    assert summary["merged_difference"] is None
    assert summary["base_parameters"] == plain["base_parameters"]
    assert summary["base_bytes_per_device"] < plain["base_bytes_per_device"]
    before = summary["before"]["validation"]["loss"]
    assert before == pytest.approx(plain["before"]["validation"]["loss"], rel=0.1)
    assert before != plain["before"]["validation"]["loss"]
    assert summary["after"]["validation"]["loss"] < before
    out = tmp_path / "out.jsonl"
    arguments = ["--prompt", "word1 word2", "--adapter", str(run), "--out", str(out)]
    assert generate.main([*arguments, "--max-new-tokens", "4"]) == 0
    assert texts(out)


def test_kinds_and_schemes_are_fields_of_a_sweep(
    llama: pathlib.Path, source: str, trained: Trained, tmp_path: pathlib.Path
) -> None:
    """Members that cannot share a program train one group after the other, as they do alone."""
    base = config_of(causal_lm, llama, source)
    dora = {"lora.kind": "dora", "lora.scaling": "alpha/sqrt(r)", "lora.dropout": 0.3}
    cases = (dora | {"seed": 0}, dora | {"seed": 1}, {"model.quantize": "int8"})
    sweep = SweepConfig(base=base, cases=cases, run_dir=str(tmp_path / "sweep")).expand()
    dropping = dataclasses.replace(base, lora=dataclasses.replace(base.lora, dropout=0.3))
    assert dropping.group_key != base.group_key
    summaries = train_group(tmp_path / "sweep", sweep)
    for member, ours in zip(sweep.members[1:], summaries[1:], strict=True):
        _, theirs = trained(member.config)
        for when in ("before", "after"):
            loss = theirs[when]["validation"]["loss"]
            assert ours[when]["validation"]["loss"] == pytest.approx(loss, rel=1e-5), member.name


@without_warning
@pytest.mark.parametrize(
    ("init", "scheme", "kind"),
    [("eva", "none", "lora"), ("loftq", "nf4", "lora")],
)  # fmt: skip
def test_a_run_begins_with_a_part_of_the_base_and_goes_on(
    init: str,
    scheme: str,
    kind: str,
    roberta: pathlib.Path,
    source: str,
    trained: Trained,
    tmp_path: pathlib.Path,
) -> None:
    lora, model = {"init": init, "kind": kind}, {"quantize": scheme}
    config = config_of(classification, roberta, source, lora=lora, model=model)
    run, summary = trained(config)
    assert_goes_on(run, config, tmp_path / "again")
    _, plain = trained(config_of(classification, roberta, source))
    loss, whole = (s["before"]["validation"]["loss"] for s in (summary, plain))
    assert loss == pytest.approx(whole, rel=1e-5 if scheme == "none" else 0.05)
    assert restore_about(run / "adapters/best").get(BEGUN) == (None if init == "eva" else init)
    assert_predicts(run, summary, source)


@without_warning
def test_a_run_goes_on_from_an_adapter_over_a_changed_base(
    roberta: pathlib.Path, source: str, trained: Trained, tmp_path: pathlib.Path
) -> None:
    """A run that starts from a LoftQ run uses the codes of that run's training."""
    lora, model = {"init": "loftq", "kind": "lora"}, {"quantize": "nf4"}
    config = config_of(classification, roberta, source, lora=lora, model=model)
    run, summary = trained(config)
    plain = dataclasses.replace(config, lora=LoraConfig(dropout=0.1), start_from=str(run))
    again, other = trained(plain)
    assert other["before"]["validation"] == summary["after"]["validation"]
    first, second = (lora_jax.restore(path / "adapters/best").layout for path in (run, again))
    assert first == second
    assert_goes_on(again, plain, tmp_path / "again")
    assert_predicts(again, other, source)


def test_tasks_share_a_quantised_base(
    llama: pathlib.Path, source: str, trained: Trained, tmp_path: pathlib.Path
) -> None:
    base = config_of(causal_lm, llama, source, model={"quantize": "int8"})
    small = dataclasses.replace(base, data=dataclasses.replace(base.data, batch_size=16))
    members = (Member("one", base), Member("two", small))
    config = GroupConfig(members=members, run_dir=str(tmp_path / "tasks"))
    summaries = train_group(tmp_path / "tasks", config)
    _, alone = trained(base)
    loss = alone["after"]["validation"]["loss"]
    assert summaries[0]["after"]["validation"]["loss"] == pytest.approx(loss, rel=1e-5)
