"""Whole runs of other kinds of update and on quantised bases: resumed, served, swept."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

import lora_jax
from lora_jax.bases.recipe import ABOUT, BEGUN
from lora_jax.checkpoint.adapter import restore_about
from lora_jax.checkpoint.storage import orbax
from lora_jax.groups import loop
from lora_jax.groups.config import GroupConfig, Member
from lora_jax.groups.sweep import SweepConfig
from lora_jax.report import command as report
from lora_jax.serving import generate, predict
from lora_jax.training import directory, export, mesh
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.classification import classification
from lora_jax.training.config import LoraConfig
from lora_jax.training.config_json import to_dict
from lora_jax.training.text import ModelConfig
from tests.training import tiny
from tests.training.test_text import text_config, train_in

QV = ("**/attention/{query,value,q,v}/kernel",)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "roberta", tiny.ROBERTA)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "llama", tiny.LLAMA)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.write_examples(tmp_path_factory.mktemp("data"), ("text",), int)


def config_of(workload: Any, weights: pathlib.Path, source: str, **changes: Any) -> Any:
    """A run of 6 steps with checkpoints at 3 and 6."""
    model = ModelConfig(str(weights), **changes.pop("model", {}))
    lora = LoraConfig(2, 4.0, QV, **changes.pop("lora", {}))
    fast = {"steps": 6, "evaluate_every": 3, "checkpoint_every": 3}
    return text_config(workload, weights, source, model=model, lora=lora, **fast, **changes)


def assert_goes_on(path: pathlib.Path, config: Any) -> dict[str, Any]:
    """Train; then again from the checkpoint in the middle: the same bits. The summary."""
    summary = train_in(path, config)
    again = path.with_name(f"{path.name}-again")
    shutil.copytree(path, again)
    for later in ("adapters/last", "checkpoints/6"):
        shutil.rmtree(again / later)
    (again / "summary.json").unlink(missing_ok=True)
    train_in(again, config)
    states = [orbax().load_checkpointables(p / "checkpoints/6")["state"] for p in (path, again)]
    kept = [{k: v for k, v in state.items() if k != "key"} for state in states]
    assert len(jax.tree.leaves(kept[0]["optimizer"])) > 4
    for one, two in (kept, [export.load(p, "last") for p in (path, again)]):
        pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
        assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)
    return summary


# Orbax warns that it takes the sharding from the file.
without_warning = pytest.mark.filterwarnings("ignore:Sharding info not provided")


@without_warning
@pytest.mark.parametrize("kind", ["dora", "vera"])  # the others have no more than these two
def test_a_run_of_each_kind_goes_on(
    kind: str, roberta: pathlib.Path, source: str, tmp_path: pathlib.Path
) -> None:
    lora = {"kind": kind, "scaling": "alpha/sqrt(r)"}
    summary = assert_goes_on(
        tmp_path / "run", config_of(classification, roberta, source, lora=lora)
    )
    assert summary["merged_difference"] < 1e-5
    layout = lora_jax.restore(tmp_path / "run/adapters/last").layout
    assert {(t.kind, t.scaling) for t in layout.targets} == {(kind, "alpha/sqrt(r)")}


@without_warning
def test_a_run_with_dropout_goes_on(
    roberta: pathlib.Path, source: str, tmp_path: pathlib.Path
) -> None:
    """Its masks depend on the step alone. Red: one key for all steps; dropout in evaluation."""
    config = config_of(classification, roberta, source, lora={"dropout": 0.5})
    summary = assert_goes_on(tmp_path / "run", config)
    plain = train_in(tmp_path / "plain", config_of(classification, roberta, source))
    assert summary["before"] == plain["before"]
    assert summary["merged_difference"] < 1e-5
    assert summary["after"]["validation"]["loss"] != plain["after"]["validation"]["loss"]


@without_warning
@pytest.mark.parametrize(("scheme", "scan"), [("nf4", True)])
def test_a_run_on_a_quantised_base_goes_on(
    scheme: str, scan: bool, llama: pathlib.Path, source: str, tmp_path: pathlib.Path
) -> None:
    model = {"quantize": scheme, "scan_layers": scan}
    summary = assert_goes_on(tmp_path / "run", config_of(causal_lm, llama, source, model=model))
    plain = train_in(tmp_path / "plain", config_of(causal_lm, llama, source))
    assert summary["merged_difference"] is None
    assert summary["base_parameters"] == plain["base_parameters"]
    assert summary["base_bytes_per_device"] < plain["base_bytes_per_device"]
    before = summary["before"]["validation"]["loss"]
    assert before == pytest.approx(plain["before"]["validation"]["loss"], rel=0.1)
    assert before != plain["before"]["validation"]["loss"]
    assert summary["after"]["validation"]["loss"] < before


def texts(path: pathlib.Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("kind", "scheme"), [("dora", "nf4"), ("lokr", "none")])
def test_a_classifier_predicts_as_it_was_evaluated(
    kind: str, scheme: str, roberta: pathlib.Path, source: str, tmp_path: pathlib.Path
) -> None:
    """Red: the base is not quantised again."""
    config = config_of(
        classification, roberta, source, lora={"kind": kind}, model={"quantize": scheme}
    )
    summary = train_in(tmp_path / "run", config)
    assert (ABOUT in restore_about(tmp_path / "run/adapters/best")) == (scheme != "none")
    file, out = source.replace("{split}", "validation"), tmp_path / "out.jsonl"
    arguments = ["--file", file, "--out", str(out), "--adapter", str(tmp_path / "run")]
    assert predict.main(arguments) == 0
    rows = texts(out)
    right = [str(row["prediction"]) == str(row["label"]) for row in rows]
    assert np.mean(right) == pytest.approx(summary["after"]["validation"]["accuracy"])


def test_a_decoder_on_a_quantised_base_writes(
    llama: pathlib.Path, source: str, tmp_path: pathlib.Path
) -> None:
    train_in(tmp_path / "run", config_of(causal_lm, llama, source, model={"quantize": "nf4"}))
    out = tmp_path / "out.jsonl"
    arguments = ["--prompt", "word1 word2", "--adapter", str(tmp_path / "run"), "--out", str(out)]
    assert generate.main([*arguments, "--max-new-tokens", "4"]) == 0
    assert texts(out)


def test_kinds_and_schemes_are_fields_of_a_sweep(
    llama: pathlib.Path, source: str, tmp_path: pathlib.Path
) -> None:
    """Members that cannot share a program train one group after the other, as they do alone.

    Red: all in one group; the scales of LoRA on DoRA's factors.
    """
    base = config_of(causal_lm, llama, source)
    cases = (
        {"lora.kind": "dora", "seed": 0},
        {"lora.kind": "dora", "seed": 1},
        {"model.quantize": "int8"},
        {"lora.scaling": "alpha/sqrt(r)"},
        {"lora.dropout": 0.3},
    )
    sweep = SweepConfig(base=base, cases=cases, run_dir=str(tmp_path / "sweep")).expand()
    devices = mesh.make(sweep.mesh)
    with jax.set_mesh(devices):
        summaries = loop.run(sweep, devices, tmp_path / "sweep", Console(quiet=True))
    for member, ours in zip(sweep.members[1:], summaries[1:], strict=True):
        theirs = train_in(tmp_path / member.name.replace("/", "-"), member.config)
        for when in ("before", "after"):
            loss = theirs[when]["validation"]["loss"]
            assert ours[when]["validation"]["loss"] == pytest.approx(loss, rel=1e-5), member.name


@without_warning
@pytest.mark.parametrize(
    ("init", "scheme", "kind"),
    [("eva", "none", "lora"), ("loftq", "nf4", "lora")],
)  # fmt: skip
def test_a_run_begins_with_a_part_of_the_base_and_goes_on(
    init: str, scheme: str, kind: str, roberta: pathlib.Path, source: str, tmp_path: pathlib.Path
) -> None:
    """The first outputs are the base's, as it was. Red: the new base forgotten by predict."""
    lora, model = {"init": init, "kind": kind}, {"quantize": scheme}
    config = config_of(classification, roberta, source, lora=lora, model=model)
    summary = assert_goes_on(tmp_path / "run", config)
    plain = train_in(tmp_path / "plain", config_of(classification, roberta, source))
    loss, whole = (s["before"]["validation"]["loss"] for s in (summary, plain))
    assert loss == pytest.approx(whole, rel=1e-5 if scheme == "none" else 0.05)
    assert restore_about(tmp_path / "run/adapters/best").get(BEGUN) == (
        None if init == "eva" else init
    )
    file, out = source.replace("{split}", "validation"), tmp_path / "out.jsonl"
    arguments = ["--file", file, "--out", str(out), "--adapter", str(tmp_path / "run")]
    assert predict.main(arguments) == 0
    right = [str(row["prediction"]) == str(row["label"]) for row in texts(out)]
    assert np.mean(right) == pytest.approx(summary["after"]["validation"]["accuracy"])


def test_tasks_share_a_quantised_base(
    llama: pathlib.Path, source: str, tmp_path: pathlib.Path
) -> None:
    """Batches of two sizes. Red: the check of the padding runs the bare model on codes."""
    base = config_of(causal_lm, llama, source, model={"quantize": "int8"})
    small = dataclasses.replace(base, data=dataclasses.replace(base.data, batch_size=16))
    members = (Member("one", base), Member("two", small))
    config = GroupConfig(members=members, run_dir=str(tmp_path / "tasks"))
    devices = mesh.make(config.mesh)
    with jax.set_mesh(devices):
        summaries = loop.run(config, devices, tmp_path / "tasks", Console(quiet=True))
    alone = train_in(tmp_path / "alone", base)
    loss = alone["after"]["validation"]["loss"]
    assert summaries[0]["after"]["validation"]["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_report_of_dora_on_a_quantised_base(
    roberta: pathlib.Path, source: str, tmp_path: pathlib.Path
) -> None:
    """Red: the update is read off factors alone; codes are read as a matrix."""
    run = tmp_path / "run"
    run.mkdir()
    config = config_of(
        classification, roberta, source, lora={"kind": "dora"}, model={"quantize": "nf4"}
    )
    directory.write_json(run / "config.json", to_dict(config))
    directory.finish(run, train_in(run, config))
    assert report.main([str(run)]) == 0
    text = (run / "report/report.html").read_text()
    assert "What of W it amplifies" in text and "cannot be analysed" not in text
