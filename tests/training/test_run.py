"""Whole runs of train.py on a small model of the user's own."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import lora_jax
import train
from lora_jax.checkpoint.storage import orbax
from lora_jax.training import directory, export, metrics, open_run
from lora_jax.training.summary import ACTIVITIES, commands
from tests.training.runs import OWN, SMALL, assert_same_run, run

RUN = (*SMALL, "--checkpoint-every", "4", "--lora.targets", "first/kernel", "second/kernel")


class Finished(NamedTuple):
    """A finished run with its picture, and its frozen arrays before and after."""

    path: pathlib.Path
    before: Any
    after: Any


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, draw_curves: Callable[[pathlib.Path], bytes]
) -> Finished:
    path = tmp_path_factory.mktemp("finished") / "run"
    seen: dict[str, Any] = {}
    original = open_run.Run.__init__

    def spy(self: Any, setup: Any, *rest: Any) -> None:
        seen["frozen"], seen["before"] = setup.frozen, jax.tree.map(np.array, setup.frozen)
        original(self, setup, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory.curves, "draw", draw_curves)
        patch.setattr(open_run.Run, "__init__", spy)
        run(path, *RUN)
    return Finished(path, seen["before"], seen["frozen"])


@pytest.fixture
def finished(whole: Finished) -> pathlib.Path:
    return whole.path


def test_a_model_of_the_users_own_learns(tmp_path: pathlib.Path) -> None:
    summary = run(tmp_path / "run", "--steps", "200", "--evaluate-every", "200")
    before, after = summary["before"]["validation"], summary["after"]["validation"]
    assert after["loss"] < 0.05 * before["loss"]
    assert after["within_0.1"] > 0.5


def test_the_summary_says_what_was_asked_of_it(finished: pathlib.Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    # first 2x16+16, second 16x16+16, head 16+1; rank 2 on the two kernels; Adam's two moments
    # of the trained parameters, and three counters.
    assert summary["base_parameters"] == 48 + 272 + 17
    assert summary["adapter_parameters"] == 2 * (2 + 16) + 2 * (16 + 16)
    assert summary["trainable_parameters"] == 17
    assert summary["full_checkpoint_bytes"] == 4 * summary["base_parameters"]
    assert summary["base_bytes_per_device"] == summary["full_checkpoint_bytes"]  # mesh: data alone
    assert summary["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    trained = summary["adapter_parameters"] + summary["trainable_parameters"]
    assert 8 * trained < summary["optimizer_bytes"] <= 8 * trained + 16
    assert summary["adapter_file_bytes"] == export.size(finished / "adapters/last")
    assert summary["steps"] == 12
    assert summary["skipped_steps"] == 0
    assert summary["merged_difference"] < 1e-5
    positive = ("steps_per_second", "points_per_second", "compile_seconds", "total_seconds")
    for name in (*positive, "peak_memory_bytes"):
        assert summary[name] > 0, name
    assert set(summary["before"]["validation"]) == {"loss", "within_0.1"}
    assert set(summary["after"]["validation"]) == {"loss", "within_0.1"}


def test_the_seconds_of_a_run_are_explained(finished: pathlib.Path) -> None:
    """The activities take most of the run's seconds, and no more than all."""
    summary = json.loads((finished / "summary.json").read_text())
    spent = sum(summary[f"{name}_seconds"] for name in ACTIVITIES)
    assert 0.8 * summary["total_seconds"] < spent <= summary["total_seconds"] + 0.01
    assert all(summary[f"{name}_seconds"] > 0 for name in ("open", "compare", "checkpoint"))


def test_the_next_commands_are_those_of_the_workload() -> None:
    """A run names the commands that take its adapter; a model of one's own has a report alone."""
    run = {"run": "runs/a b", "before": {"test": {"loss": 1.0}}}
    assert commands(run) == ["lora-jax report 'runs/a b'"]
    assert "predict --adapter 'runs/a b' --text" in commands({**run, "tokens_per_second": 1})[0]
    assert "predict --adapter 'runs/a b' --image" in commands({**run, "images_per_second": 1})[0]
    decoder = {**run, "tokens_per_second": 1, "before": {"test": {"perplexity": 9.0}}}
    assert "generate --adapter 'runs/a b' --prompt" in commands(decoder)[0]


def test_the_record_has_every_step_once_and_every_evaluation(finished: pathlib.Path) -> None:
    lines = metrics.read(finished)
    steps = [line for line in lines if "split" not in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    for name in ("loss", "learning_rate", "gradient_norm", "units", "skipped"):
        assert all(name in line for line in steps), name
    evaluations = [line["step"] for line in lines if line.get("split") == "validation"]
    assert evaluations == [0, 4, 8, 12]
    assert list(finished.glob("events.out.tfevents.*"))
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


# Orbax warns that it takes the sharding from the file.
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_it_goes_on_with_its_targets_in_another_order(
    finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "stopped"
    run(path, *RUN[:-2], "second/kernel", "first/kernel")
    (path / "summary.json").unlink()
    for later in ("adapters/last", "checkpoints/8", "checkpoints/12"):
        shutil.rmtree(path / later, ignore_errors=True)
    run(path, *RUN)
    assert_same_run(finished, path, 12)


def test_a_finished_run_says_so_and_is_not_run_again(
    finished: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "summary.json").stat().st_mtime_ns
    run(finished, *RUN)
    text = capsys.readouterr().out
    assert "is finished; --fresh deletes it" in text
    assert "adapter parameters" in text
    assert (finished / "summary.json").stat().st_mtime_ns == before


def test_a_dry_run_takes_a_step_and_leaves_nothing(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert train.main(["--config", OWN, "--run-dir", str(path), *RUN, "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("batch: x float32[32, 2]", "100 numbers for 2 parameters", "memory of the step"):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_fresh_starts_again(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(shutil.copytree(finished, tmp_path / "run"))
    first = (path / "metrics.jsonl").read_bytes()
    run(path, *RUN, "--fresh", "--seed", "3")
    second = (path / "metrics.jsonl").read_bytes()
    assert first != second
    assert second.count(b"\n") == first.count(b"\n")


def test_fresh_does_not_delete_what_no_run_wrote(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert train.main(["--config", OWN, "--run-dir", str(tmp_path), "--fresh"]) == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


def test_a_directory_of_another_config_is_an_error(
    finished: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config", OWN, "--run-dir", str(finished), *SMALL, "--lora.rank", "1"]
    assert train.main(arguments) == 1
    text = " ".join(capsys.readouterr().err.split())
    assert "lora.rank: 2 -> 1" in text
    assert "--fresh" in text


def test_two_processes_do_not_train_in_one_directory(tmp_path: pathlib.Path) -> None:
    from lora_jax.cli import train as command_line

    name, config, _ = command_line.parse(
        ["--config", OWN, "--run-dir", str(tmp_path)], OWN, tmp_path
    )
    with (
        directory.enter(name, config),
        pytest.raises(lora_jax.LoraError, match="another process is training"),
        directory.enter(name, config),
    ):
        pass
    with directory.enter(name, config):  # the holder has released the lock
        pass


def test_the_default_directory_is_named_by_what_matters() -> None:
    from lora_jax.cli import train as command_line

    def path(*arguments: str) -> pathlib.Path:
        return directory.default(
            *command_line.parse(["--config", OWN, *arguments], OWN, pathlib.Path())[:2]
        )

    assert path() == path("--log-every", "3", "--checkpoint-every", "7", "--on-nonfinite", "skip")
    assert path().parts[0] == "runs"
    assert path().name.startswith("own_model-")
    different = [path(), path("--lora.rank", "4"), path("--width", "8"), path("--seed", "1")]
    assert len(set(different)) == 4


def test_w0_is_bit_identical_after_training(whole: Finished) -> None:
    assert len(jax.tree.leaves(whole.before)) == 4
    jax.tree.map(np.testing.assert_array_equal, whole.before, whole.after)


def test_no_base_weight_is_on_disk(finished: pathlib.Path) -> None:
    step = max((p for p in (finished / "checkpoints").iterdir()), key=lambda p: int(p.name))
    frozen = {(2, 16), (16, 16), (16,)}
    held = orbax().checkpointables_metadata(step).metadata["state"]
    shapes = [tuple(x.shape) for x in jax.tree.leaves(held)]
    assert len([s for s in shapes if s == (16, 2)]) == 3  # the second kernel's a, and its moments
    # Each b has the shape [2, 16] of the first kernel: only the two and their moments may be there.
    assert shapes.count((2, 16)) == 2 * 3
    assert not (frozen - {(2, 16)}) & set(shapes)
    assert (16, 1) in shapes  # the head, trained in full


def test_adapters_of_a_run_are_restored_alone(finished: pathlib.Path) -> None:
    layout, adapters, _ = lora_jax.restore(finished / "adapters/best")
    assert list(adapters) == ["first/kernel", "second/kernel"]
    assert layout.targets[0].rank == 2
    assert list(export.load(finished, "best")["base"]) == ["head/bias", "head/kernel"]


def test_best_is_kept_when_later_steps_are_worse(tmp_path: pathlib.Path) -> None:
    arguments = ("--optimizer.learning-rate", "3", "--optimizer.schedule", "constant")
    summary = run(tmp_path / "run", *SMALL, "--evaluate-every", "1", *arguments)
    losses = {
        line["step"]: line["loss"]
        for line in metrics.read(tmp_path / "run")
        if line.get("split") == "validation" and line["step"] > 0
    }
    assert summary["best_step"] == min(losses, key=losses.__getitem__) != 12
    assert summary["after"]["validation"]["loss"] == min(losses.values())
    best, last = (export.load(tmp_path / "run", name) for name in ("best", "last"))
    assert not np.array_equal(best["base"]["head/kernel"], last["base"]["head/kernel"])


@pytest.mark.few(1)
@pytest.mark.parametrize(("more", "numbers"), [((), 17), (("--lora.trainable", "**"), 337)])
def test_without_targets_the_head_or_everything_is_trained(
    more: tuple[str, ...], numbers: int, tmp_path: pathlib.Path
) -> None:
    summary = run(tmp_path / "run", *SMALL, "--steps", "2", "--lora.targets", *more)
    assert summary["adapter_parameters"] == summary["merged_difference"] == 0
    assert summary["trainable_parameters"] == numbers <= summary["base_parameters"] == 337
    assert lora_jax.restore(tmp_path / "run/adapters/last")[1] == {}


def test_a_run_begins_as_its_config_says(tmp_path: pathlib.Path) -> None:
    """With a learning rate near zero, `a` at the end is what the config's method draws."""
    still = ("--optimizer.learning-rate", "1e-30", "--steps", "1", "--lora.init", "orthogonal")
    run(tmp_path, *SMALL, *still)
    layout, adapters, _ = lora_jax.restore(tmp_path / "adapters/last")
    for method, alike in (("orthogonal", True), ("gaussian", False)):
        wanted = lora_jax.init(jax.random.key(0), layout, method=method)
        both = [x[layout.targets[0].path].a for x in (adapters, wanted)]
        assert np.allclose(*both, atol=1e-6) == alike


POISON = """
import dataclasses, sys
import numpy as np
sys.path.insert(0, {folder!r})
import own_model

class Poisoned(own_model.Points):
    def __next__(self):
        batch = super().__next__()
        return {{**batch, "x": batch["x"] * np.float32("nan")}} if self.position == 7 else batch

def workload(config):
    made = own_model.workload(config)
    return dataclasses.replace(made, train=lambda shard: Poisoned(1, config.batch_size, shard))

config = dataclasses.replace(own_model.config, workload=workload)
"""


@pytest.fixture
def poison(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    file = tmp_path / "poison.py"
    file.write_text(POISON.format(folder=str(pathlib.Path(OWN).parent)))
    monkeypatch.syspath_prepend(str(pathlib.Path(OWN).parent))
    return str(file)


def test_a_nonfinite_step_stops_the_run_and_is_named(
    poison: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    arguments = ["--config", poison, "--run-dir", str(path), *SMALL, "--checkpoint-every", "2"]
    assert train.main(arguments) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "step 7 is not finite: loss nan" in error
    assert "step 6 is kept" in error
    assert not (path / "summary.json").exists()
    assert max(int(p.name) for p in (path / "checkpoints").iterdir()) == 6
    # With another flag the same command goes on past this step.
    summary = run(path, *SMALL, "--checkpoint-every", "2", "--on-nonfinite", "skip", config=poison)
    assert (summary["steps"], summary["skipped_steps"]) == (12, 1)
    lines = [line for line in metrics.read(path) if "split" not in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if not line["finite"]] == [7]
    assert [line["step"] for line in lines if line["loss"] is None] == [7]
