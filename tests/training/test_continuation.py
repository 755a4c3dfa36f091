"""Runs that go on with other settings, stop early, and pick the best adapter by two scores."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import shutil
import types
from typing import Any

import jax
import numpy as np
import pytest

import train
from lora_jax import training
from lora_jax.cli import train as command_line
from lora_jax.data.config import DataConfig
from lora_jax.sweeps.config import GroupConfig, Member
from lora_jax.training import directory, metrics
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.config import Config, ConfigError, LoraConfig, OptimizerConfig
from lora_jax.training.notes import Notes
from lora_jax.training.open_run import Run
from lora_jax.training.text import ModelConfig, TextConfig
from tests.training import tiny
from tests.training.runs import OWN, ROOT, SMALL, assert_same_run, run, train_group, train_in
from tests.training.test_text import text_config

# Orbax warns that it takes the sharding from the file; two CPU arrays have no other.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

STEADY = ("--optimizer.schedule", "constant", "--optimizer.warmup", "0")
ONE = jax.devices()[:1]
RUN = (*SMALL, "--checkpoint-every", "4", *STEADY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    run(path, *RUN)
    return path


@pytest.fixture
def copy(finished: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))


def test_an_extended_run_equals_one_of_so_many_steps(
    copy: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(copy, *RUN, "--steps", "20")
    assert summary["history"] == [{"step": 12, "changed": ["steps: 12 -> 20"]}]
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "Changed after step 12: steps: 12 -> 20 The learning rate was 0.01 and goes on at" in said
    )
    run(tmp_path / "whole", *RUN, "--steps", "20")
    assert_same_run(copy, tmp_path / "whole", 20)


def test_settings_of_the_way_may_change_and_are_remembered(copy: pathlib.Path) -> None:
    more = ("--optimizer.learning-rate", "1e-4", "--accumulate", "2", "--evaluate-every", "2")
    summary = run(copy, *RUN, "--steps", "14", *more)
    assert json.loads((copy / "config.json").read_text())["accumulate"] == 2
    (entry,) = summary["history"]
    assert {line.partition(":")[0] for line in entry["changed"]} == {
        "steps", "accumulate", "evaluate_every", "optimizer.learning_rate"
    }  # fmt: skip
    lines = metrics.read(copy)
    assert [line["step"] for line in lines if line.get("split")] == [0, 4, 8, 12, 14]
    rates = [line["learning_rate"] for line in lines if "split" not in line]
    assert rates == pytest.approx([1e-2] * 12 + [1e-4] * 2)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--lora.rank", "1", "--steps", "20"), ("lora.rank: 2 -> 1", "--from")),
        (("--optimizer.learning-rate", "1"), ("has taken 12 steps", "Give more --steps")),
        (("--steps", "4"), ("has taken 12 steps", "steps: 12 -> 4")),
    ],
)
def test_a_change_that_cannot_be_names_the_setting_and_the_cure(
    finished: pathlib.Path,
    more: tuple[str, ...],
    said: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (finished / "config.json").read_bytes()
    assert train.main(["--config", OWN, "--run-dir", str(finished), *RUN, *more]) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert all(part in text for part in said), text
    assert (finished / "config.json").read_bytes() == before
    assert (finished / "summary.json").exists()


def test_a_finished_run_without_checkpoints_does_not_start_over(
    copy: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "checkpoints")
    assert train.main(["--config", OWN, "--run-dir", str(copy), *RUN, "--steps", "20"]) == 1
    assert "its checkpoints are gone" in " ".join(capsys.readouterr().err.split())


def test_a_run_without_a_better_step_stops_and_more_patience_goes_on(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ("--evaluate-every", "1", "--optimizer.learning-rate", "3", "--steps", "30")
    summary = run(tmp_path, *RUN, *wild, "--patience", "2")
    assert summary["stopped_early"]
    assert summary["steps"] == summary["best_step"] + 2 < 30
    best = f"step {summary['best_step']}, by validation loss, after which it stopped early"
    assert best in " ".join(capsys.readouterr().out.split())
    longer = run(tmp_path, *RUN, *wild, "--patience", "4")
    assert longer["steps"] > summary["steps"]
    assert [line["step"] for line in metrics.read(tmp_path) if "split" not in line] == [
        *range(1, longer["steps"] + 1)
    ]


@pytest.mark.parametrize(
    ("accuracy", "loss", "better"),
    [(1.0, 0.1, True), (1.0, 0.2, False), (0.9, 0.0, False), (1.1, 9.0, True),
     (float("nan"), 0.0, False), (1.0, float("nan"), False)],
)  # fmt: skip
def test_equal_scores_are_told_apart_by_the_loss(
    accuracy: float, loss: float, better: bool
) -> None:
    workload = types.SimpleNamespace(select="accuracy", better="higher")
    best = {"step": 4.0, "accuracy": 1.0, "loss": 0.2}
    run: Any = types.SimpleNamespace(
        setup=types.SimpleNamespace(workload=workload), notes=Notes(best=best)
    )
    assert Run._is_better(run, {"accuracy": accuracy, "loss": loss}) == better


@pytest.mark.slow
def test_packed_rows_of_another_batch_size_go_on_at_the_same_example(
    llama: pathlib.Path, source: str, tmp_path: pathlib.Path
) -> None:
    """The 12 rows of 3 batches of 4 are 6 batches of 2, so batch 7 of 2 is the next."""

    def config(rows: int, steps: int) -> Any:
        found = text_config(causal_lm, llama, source, steps=steps, checkpoint_every=1)
        data = dataclasses.replace(found.data, batch_size=rows)
        return dataclasses.replace(found, data=data)

    taken = []
    original = Run.count

    def count(self: Run, rows: Any) -> int:
        taken.append(np.asarray(rows["input_ids"]))
        return original(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "count", count)
        train_in(tmp_path / "two", config(2, 8), ONE)
        wanted, taken[:] = taken[6:8], []
        train_in(tmp_path / "four", config(4, 3), ONE)
        taken.clear()
        train_in(tmp_path / "four", config(2, 5), ONE)
    np.testing.assert_array_equal(taken, wanted)


@pytest.mark.slow
def test_members_of_a_group_stop_early_and_are_extended(tmp_path: pathlib.Path) -> None:

    base: Any = command_line.load(OWN, ROOT)[1]
    base = dataclasses.replace(base, width=16, batch_size=8, evaluate_every=2, checkpoint_every=4)

    def member(name: str, rate: float, steps: int, patience: int | None) -> Member:
        own = dataclasses.replace(
            base.optimizer, learning_rate=rate, schedule="constant", warmup=0.0
        )
        config: Config = dataclasses.replace(base, optimizer=own, steps=steps, patience=patience)
        return Member(name, config)

    group = GroupConfig(members=(member("a", 1e-3, 12, None), member("b", 3.0, 12, 1)))
    first = train_group(tmp_path / "group", group)
    assert [summary["stopped_early"] for summary in first] == [False, True]
    assert first[1]["steps"] == first[1]["best_step"] + 2 < 12
    for path, steps in (("whole", 20), ("extended", 12), ("extended", 20)):
        train_group(tmp_path / path, GroupConfig(members=(member("a", 1e-3, steps, None),)))
    assert_same_run(tmp_path / "extended/a", tmp_path / "whole/a", 20)


@pytest.mark.slow
def test_a_template_tells_the_day_on_which_the_run_began(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a run that goes on after midnight would read other tokens."""
    found = tiny.write_chat(tmp_path)
    template = tmp_path / "base" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}\n" + template.read_text())

    def on(day: int, name: str, steps: int) -> pathlib.Path:
        today = types.SimpleNamespace(today=lambda: datetime.date(2001, 2, day))
        monkeypatch.setattr(directory, "datetime", types.SimpleNamespace(date=today))
        config = TextConfig(
            workload=causal_lm,
            model=ModelConfig(reference=found["base"]),
            data=DataConfig(found["chats"], max_length=96, batch_size=8, eval_batch_size=8),
            lora=LoraConfig(rank=2, targets=("layers*/attention/*/kernel",)),
            optimizer=OptimizerConfig(schedule="constant"),
            run_dir=str(tmp_path / name),
            steps=steps,
            evaluate_every=2,
        )
        return training.run(config, quiet=True).path

    on(3, "extended", 2)
    one, other, later = on(4, "extended", 4), on(3, "whole", 4), on(4, "later", 4)
    assert_same_run(one, other, 4)
    assert json.loads((one / "config.json").read_text())["day"] == "2001-02-03"
    assert (later / "metrics.jsonl").read_bytes() != (one / "metrics.jsonl").read_bytes()


def test_a_day_is_a_date() -> None:
    with pytest.raises(ConfigError, match="day must be a date, as 2026-12-03, got '3 December'"):
        text_config(causal_lm, pathlib.Path("nowhere"), "nothing.jsonl", day="3 December")
