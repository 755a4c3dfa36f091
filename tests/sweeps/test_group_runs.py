"""Groups on the small model of own_model.py that are stopped, killed or changed, or that fail."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import train
from lora_jax.cli import train as command_line
from lora_jax.sweeps import loop
from lora_jax.sweeps.config import GroupConfig, Member
from lora_jax.sweeps.group import Group
from lora_jax.sweeps.members import Opener
from lora_jax.training import export, metrics, processes
from lora_jax.training.config import ConfigError, LoraConfig, MeshConfig, OptimizerConfig
from lora_jax.training.mesh import make
from tests.sweeps.test_group_step import close
from tests.training.runs import OWN, ROOT, assert_same_run, saved_state, train_group, train_in

# Orbax warns that it takes the sharding from the file; two CPU arrays have no other.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

STEPS = 40
BASE: Any = command_line.load(OWN, ROOT)[1]
DEVICES = jax.devices()[:1]


def member(
    name: str, seed: int, rank: int, rate: float = 1e-2, steps: int = STEPS, **rest: Any
) -> Member:
    config = dataclasses.replace(
        BASE,
        **{
            "width": 16, "batch_size": 8, "steps": steps, "seed": seed, "evaluate_every": 20,
            "checkpoint_every": 10, "lora": LoraConfig(rank, 4.0, ("{first,second}/kernel",)),
            "optimizer": OptimizerConfig(rate), **rest,
        },
    )  # fmt: skip
    return Member(name, config)


A, B, C = member("a", 0, 1), member("b", 1, 2, 3e-3), member("c", 2, 2, 1e-3, steps=25)


def together(path: pathlib.Path, *members: Member, **options: Any) -> list[dict[str, Any]]:
    return train_group(path, GroupConfig(members=members, **options), DEVICES)


def alone(path: pathlib.Path, one: Member) -> dict[str, Any]:
    return train_in(path, one.config, DEVICES)


@contextlib.contextmanager
def stopped(tick: int) -> Iterator[None]:
    """Run the block with a SIGTERM that arrives at this tick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.Preemption, "asked", lambda self, n: n == tick)
        try:
            yield
        except processes.Preempted:
            return
    pytest.fail("the block ended before the signal")


def steps_of(run: pathlib.Path) -> list[int]:
    return [line["step"] for line in metrics.read(run) if "split" not in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a group that was never stopped."""
    path = tmp_path_factory.mktemp("whole")
    together(path, A, B, C)
    return path


def test_stopped_and_resumed_is_the_same_bit_for_bit(
    whole: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A group that was stopped and resumed twice ends with the same bits."""
    with stopped(17):
        together(tmp_path, A, B, C)
    with stopped(16):
        together(tmp_path, A, B, C)  # at step 33
    assert (tmp_path / "c/summary.json").exists()
    shutil.rmtree(tmp_path / "a/checkpoints/33")
    together(tmp_path, A, B, C)
    for one in (A, B, C):
        assert_same_run(tmp_path / one.name, whole / one.name, one.config.steps)


def test_a_group_that_is_preempted_says_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GroupConfig(members=(A,), run_dir=str(tmp_path))
    monkeypatch.setattr(train.command_line, "parse", lambda *_: ("group", config, None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.Preemption, "asked", lambda self, n: n == 2)
        assert train.main([]) == processes.PREEMPTED
    assert f"SIGTERM: every member of {tmp_path} is saved" in capsys.readouterr().out


def test_a_member_goes_on_alone_and_back(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A member may go on alone and in the group again; its checkpoints are a single run's."""
    with stopped(7):
        together(tmp_path, A, B)
    with stopped(21):
        alone(tmp_path / "a", A)
    together(tmp_path, A, B)
    for one in (A, B):
        assert steps_of(tmp_path / one.name) == list(range(1, STEPS + 1))
        close(saved_state(tmp_path / one.name, STEPS), saved_state(whole / one.name, STEPS))


def test_a_finished_group_says_what_it_came_to_and_trains_nothing(whole: pathlib.Path) -> None:
    before = (whole / "a/metrics.jsonl").stat().st_mtime_ns
    found = together(whole, A, B, C)
    assert [summary["run"] for summary in found] == [str(whole / name) for name in "abc"]
    assert (whole / "a/metrics.jsonl").stat().st_mtime_ns == before


def test_paused_members_wait_and_new_ones_join(whole: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with stopped(12):
        together(tmp_path, A, dataclasses.replace(B, paused=True))
    assert not (tmp_path / "b").exists()
    together(tmp_path, A, B, C, only=("b", "c"))
    assert not (tmp_path / "a/summary.json").exists()
    assert len(together(tmp_path, A, B, C)) == 3
    for one in (A, B, C):
        steps = one.config.steps
        close(saved_state(tmp_path / one.name, steps), saved_state(whole / one.name, steps))


def test_more_members_than_fit_train_one_after_the_other(
    tmp_path: pathlib.Path,
    whole: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fit(needed: Any, shared: float, members: int, memory: float, at_once: int) -> Any:
        return loop.memory_fit.Fit(members, min(members, 2), needed.bytes, memory)

    monkeypatch.setattr(loop.memory_fit, "fit", fit)
    assert len(together(tmp_path, A, B, C)) == 3
    assert "3 members in 2 groups of at most 2" in capsys.readouterr().out
    for one in (A, B, C):
        steps = one.config.steps
        close(saved_state(tmp_path / one.name, steps), saved_state(whole / one.name, steps))


# ---- in one process: who is in the group


@contextlib.contextmanager
def grouped(path: pathlib.Path, *members: Member) -> Iterator[tuple[Group, Opener]]:
    """Yield a group, and a function that opens more members for it."""
    grid = make(MeshConfig(), DEVICES)
    with jax.set_mesh(grid), Opener(grid, print) as opener:
        opened = [opener.open(m.name, m.config, path / m.name) for m in members]
        assert opener.base is not None
        yield Group(opened, opener.base.frozen, grid, MeshConfig()), opener


def test_joining_leaving_and_finishing_compile_once_and_pausing_never(
    tmp_path: pathlib.Path, compilations: list[str]
) -> None:
    """A change of the common shapes compiles once."""

    def ticks(count: int) -> int:
        """Take `count` ticks, and return the number of compilations in them."""
        before = len(compilations)
        for _ in range(count):
            group.tick()
        group.settle()
        return len(compilations) - before

    with grouped(tmp_path, B, A) as (group, opener):
        assert ticks(3) == 1
        group.member("a").paused = True
        assert ticks(3) == 0
        group.member("a").paused = False
        assert ticks(2) == 0
        new = opener.open("c", C.config, tmp_path / "c")
        group.join(new)
        assert ticks(3) == 1
        group.leave("a")
        assert ticks(1) == 0  # two members of the same common shapes, as at first
        assert [m.name for m in group.members] == ["b", "c"]
        assert [m.step for m in group.members] == [12, 4]


def test_members_that_come_and_go_are_what_they_are_alone(
    tmp_path: pathlib.Path, whole: pathlib.Path
) -> None:
    with grouped(tmp_path, A, B) as (group, opener):

        def ticks(count: int) -> None:
            for _ in range(count):
                group.tick()

        ticks(5)
        group.member("a").paused = True
        ticks(5)
        group.join(opener.open("c", C.config, tmp_path / "c"))
        group.member("a").paused = False
        ticks(30)  # b has taken 40, c 25 and then none, a 35
        (b,) = group.leave("b")
        ticks(10)
        for one, found in ((A, group.member("a")), (C, group.member("c"))):
            assert found.left == 0
            assert len(found.host) > 0
            close(group.state(found).trained, last(whole, one))
        close(b.state_shapes.state(b.host).trained, last(whole, B))


def last(path: pathlib.Path, one: Member) -> Any:
    """Return the parameters that a member trained in the group that was never stopped."""
    return export.load(path / one.name, "last")


def test_free_slots_are_given_up_when_that_is_worth_a_compilation() -> None:
    class Slot:
        def __init__(self, name: str, left: int) -> None:
            self.name, self.left = name, left

    def kept(**left: int) -> list[str]:
        slots: Any = [Slot(name, steps) for name, steps in left.items()]
        return loop._slots(slots)

    few, many = loop.WORTH // 2 - 1, loop.WORTH // 2
    assert kept(a=0, b=few, c=0) == ["a", "b", "c"]
    assert kept(a=0, b=many, c=0) == ["b"]
    assert kept(a=0, b=0) == []


def test_a_group_that_gives_up_slots_is_the_same(
    tmp_path: pathlib.Path, whole: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`c` ends at step 25 and loses its slot; a stop and a new start after that change no bit."""
    monkeypatch.setattr(loop, "WORTH", 1)
    together(tmp_path / "whole", A, B, C)
    with stopped(33):
        together(tmp_path / "run", A, B, C)
    together(tmp_path / "run", A, B, C)
    for one in (A, B, C):
        own, steps = tmp_path / "run" / one.name, one.config.steps
        assert_same_run(own, tmp_path / "whole" / one.name, steps)
        close(saved_state(own, steps), saved_state(whole / one.name, steps))


# ---- members that fail


@pytest.fixture
def poisoned() -> Any:
    """A workload whose batch 6 is NaN."""
    module: Any = sys.modules[BASE.workload.__module__]

    class Poisoned(module.Points):
        def __next__(self) -> Any:
            batch = super().__next__()
            nan = np.float32("nan" if self.position == 6 else "1")
            return {**batch, "x": batch["x"] * nan}

    def workload(config: Any) -> Any:
        made = module.workload(config)
        seed, size = config.seed + 1, config.batch_size
        return dataclasses.replace(made, train=lambda shard: Poisoned(seed, size, shard))

    return workload


def test_a_member_that_diverges_stops_and_the_others_go_on(
    poisoned: Any, tmp_path: pathlib.Path, whole: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = member("bad", 5, 2, workload=poisoned)
    with pytest.raises(loop.StoppedError, match="1 of 3 members stopped:\nbad: step 6") as caught:
        together(tmp_path, A, bad, B)
    assert [summary["run"][-1] for summary in caught.value.summaries] == ["a", "b"]
    for one in (A, B):
        close(saved_state(tmp_path / one.name, STEPS), saved_state(whole / one.name, STEPS))
    assert "step 6 is not finite" in (tmp_path / "bad/error.txt").read_text()
    assert "bad stops: step 6 is not finite" in " ".join(capsys.readouterr().out.split())
    assert not list((tmp_path / "bad/checkpoints").iterdir())
    # With another setting the same member goes on past this step.
    skipping = dataclasses.replace(bad, config=dataclasses.replace(bad.config, on_nonfinite="skip"))
    summaries = together(tmp_path, A, skipping, B)
    assert (summaries[1]["steps"], summaries[1]["skipped_steps"]) == (STEPS, 1)
    assert not (tmp_path / "bad/error.txt").exists()
    alone(tmp_path / "alone", skipping)
    close(saved_state(tmp_path / "bad", STEPS), saved_state(tmp_path / "alone", STEPS))


def test_what_is_said_of_a_group_is_not_said_of_a_member(tmp_path: pathlib.Path) -> None:
    own = dataclasses.replace(A.config, run_dir="elsewhere")
    with pytest.raises(ConfigError, match="not for its member 'a': give --run-dir"):
        together(tmp_path, Member("a", own))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"accumulate": 2}, r"accumulate must be the same .*, got \[1, 2\]"),
        # Rows cannot be added to these batches, as the loss of own_model.py counts every row.
        ({"batch_size": 16}, "'a' are smaller .* from 8 to 16"),
        ({"width": 8}, "'a' and 'other' do not have the same base: 'first/"),
    ],
)
def test_members_that_do_not_fit_together_are_refused(
    changes: dict[str, int], says: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        together(tmp_path, A, member("other", 1, 1, **changes))


def test_a_group_has_its_own_line_in_train_py(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "two.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.sweeps.test_group_runs import A, B\n"
        "from lora_jax.sweeps.config import GroupConfig\n"
        "config = GroupConfig(members=(A, B))\n"
    )
    arguments = ["--config", str(file), "--run-dir", str(tmp_path / "run"), "--mesh.data", "8"]
    assert train.main([*arguments, "--a.steps", "4", "--b.steps", "8"]) == 0
    assert [
        json.loads((tmp_path / "run" / n / "summary.json").read_text())["steps"] for n in "ab"
    ] == [4, 8]
    assert (tmp_path / "run/results.csv").exists()
    assert "step 12/12 of all" in capsys.readouterr().out
