"""Groups of members: the members of a sweep, and the options of the command line."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

import train
from configs import minilm_reviews
from lora_jax.cli import train as command_line
from lora_jax.sweeps import loop, member_names
from lora_jax.sweeps.config import GroupConfig, Member, short_hash
from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.training.config import Config, ConfigError
from lora_jax.training.config_json import identity
from tests.training.runs import ROOT

BASE = minilm_reviews.config
SWEEP = str(ROOT / "configs/sweep.py")
TASKS = str(ROOT / "configs/multitask.py")


def sweep(grid: dict[str, Any], *cases: dict[str, Any], **options: Any) -> GroupConfig:
    return SweepConfig(base=BASE, grid=grid, cases=cases, **options).expand()


def called(group: GroupConfig) -> list[str]:
    return [member.name for member in group.members]


def parse(*arguments: str, config: str = SWEEP) -> GroupConfig:
    found = command_line.parse(arguments, config, ROOT)[1]
    assert isinstance(found, GroupConfig)
    return found


def test_all_combinations_with_readable_names() -> None:
    group = sweep({"lora.rank": (1, 4), "optimizer.learning_rate": (1e-3, 0.02)})
    assert called(group) == [
        "rank=1,learning_rate=1e-3",
        "rank=1,learning_rate=0.02",
        "rank=4,learning_rate=1e-3",
        "rank=4,learning_rate=0.02",
    ]
    last = group.members[-1].config
    assert (last.lora.rank, last.optimizer.learning_rate) == (4, 0.02)
    assert last.lora.targets == BASE.lora.targets


@pytest.mark.parametrize("base", ["minilm_reviews", "own_model"])
def test_a_member_is_what_the_command_line_makes_of_the_base(base: str) -> None:
    """A grid takes fields of every kind, in the forms in which a config may give them."""
    grid: dict[str, Any] = {
        "lora.rank": np.array([2]),
        "lora.alpha": (4,),  # an int for a float
        "lora.init": ("orthogonal",),
        "lora.targets": (["**/kernel@rank=1", "**/bias"],),
        "lora.trainable": (None,),
        "optimizer.schedule": ("constant",),
        "optimizer.clip": (None,),
        "optimizer.learning_rate": np.logspace(-3, -3, 1),
        "seed": (7,),
    }
    config = command_line.load(f"configs/{base}.py", ROOT)[1]
    assert isinstance(config, Config)
    (member,) = SweepConfig(base=config, grid=grid).expand().members
    line = [
        *("--lora.rank", "2", "--lora.alpha", "4", "--lora.init", "orthogonal"),
        *("--lora.targets", "**/kernel@rank=1", "**/bias", "--lora.trainable", "None"),
        *("--optimizer.schedule", "constant", "--optimizer.clip", "None"),
        *("--optimizer.learning-rate", "1e-3", "--seed", "7"),
    ]
    solo = command_line.parse(line, f"configs/{base}.py", ROOT)[1]
    assert identity(solo) == identity(member.config)
    assert repr(solo.lora) == repr(member.config.lora)  # 4.0, not 4
    assert repr(solo.optimizer) == repr(member.config.optimizer)


def test_cases_each_with_all_of_the_grid() -> None:
    both = ({"lora.rank": 2, "lora.alpha": 4.0}, {"lora.rank": 8})
    group = sweep({"seed": (0, 1)}, *both)
    assert called(group) == [
        "rank=2,alpha=4,seed=0",
        "rank=2,alpha=4,seed=1",
        "rank=8,seed=0",
        "rank=8,seed=1",
    ]
    assert group.members[2].config.lora.alpha == BASE.lora.alpha
    assert called(sweep({}, *both)) == ["rank=2,alpha=4", "rank=8"]


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ({"lora.rnak": (1,)}, "no field 'lora.rnak'.*nearest:\n  lora.rank\n"),
        ({"learning_rate": (1.0,)}, "no field 'learning_rate'.*  optimizer.learning_rate"),
        ({"lora": (1,)}, "no field 'lora'"),
        ({"run_dir": ("x",)}, "no field 'run_dir'"),
        ({"lora.rank": (1.5,)}, r"grid: lora\.rank must be int, got 1\.5"),
        ({"lora.rank": (True,)}, r"lora\.rank must be int, got True"),
        ({"lora.rank": "1,two"}, r"lora\.rank must be int, got 'two'"),
        ({"lora.rank": (0,)}, r"lora\.rank must be at least 1, got 0"),
        ({"lora.rank": ()}, r"lora\.rank must be at least one value"),
        ({"lora.init": ("gausian",)}, "lora.init must be 'gaussian' or 'uniform' or"),
        ({"lora.targets": ("**/kernel",)}, "must be str, several, got '\\*\\*/kernel'"),
        ({"optimizer.clip": ("None",)}, "optimizer.clip must be float or None, got 'None'"),
        ({"seed": (1, 2, 1)}, "must be members that differ"),
    ],
)
def test_what_cannot_be_is_an_error(grid: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        sweep(grid)


def test_errors_of_cases() -> None:
    with pytest.raises(ConfigError, match=r"(?s)cases: .*nearest:\n  lora\.alpha"):
        sweep({}, {"lora.alhpa": 1.0})
    with pytest.raises(ConfigError, match=r"other fields than cases, got \['seed'\]"):
        sweep({"seed": (0, 1)}, {"seed": 3})


def test_what_is_said_of_the_whole_is_not_said_of_the_base() -> None:
    with pytest.raises(ConfigError, match=r"base\.run_dir .* give --run-dir"):
        SweepConfig(base=dataclasses.replace(BASE, run_dir="x"))


def test_names_tell_targets_apart() -> None:
    targets = (
        ("bert/encoder/layer*/attention/{query,value}/kernel",),
        ("all-linear",),
        ("**/query/kernel@rank=4,alpha=3", "**/mlp/*/kernel"),
        (),
    )
    group = sweep({"lora.targets": targets})
    assert called(group) == [
        "targets=query+value",
        "targets=all-linear",
        "targets=query@rank4@alpha3+mlp",
        "targets=none",
    ]
    assert called(sweep({"lora.targets": (("a/x/kernel",), ("b/x/kernel",))})) == [
        "targets=x#1",
        "targets=x#2",
    ]


@pytest.mark.parametrize("value", [1e-3, 2.5e-4, 0.1, 1 / 3, 3e8, 1e-300, 12345.678])
def test_numbers_in_names_read_back(value: float) -> None:
    assert float(member_names.number(value)) == value


def test_names_are_folders() -> None:
    for wrong in ("", "a/b", "..", ".hidden"):
        with pytest.raises(ConfigError, match="folder's name"):
            Member(wrong, BASE)
    twice = (Member("a", BASE), Member("a", BASE))
    with pytest.raises(ConfigError, match=r"each there once, got \['a'\]"):
        GroupConfig(members=twice)


def test_only_some_members_train() -> None:
    group = sweep({"lora.rank": (1, 2), "seed": (0, 1)}, only=("rank=2,*", "rank=1,seed=0"))
    assert [group.waits(m) for m in group.members] == [False, True, False, False]
    going = [m.name for m in group.members if not group.waits(m)]
    assert list(loop._configs(group, pathlib.Path("runs"))) == going
    everyone = sweep({"lora.rank": (1, 2), "seed": (0, 1)})
    assert short_hash(group) == short_hash(everyone)  # so it goes on in the same directory
    assert short_hash(sweep({"lora.rank": (1, 2)})) != short_hash(everyone)
    with pytest.raises(ConfigError, match="'rank=3' matches no member; nearest: rank="):
        sweep({"lora.rank": (1, 2)}, only=("rank=3",))


def test_the_command_line_of_a_sweep() -> None:
    group = parse("--base.steps", "5", "--base.data.batch-size", "2", "--memory", "1e9")
    assert len(group.members) == 16
    assert {m.config.steps for m in group.members} == {5}
    assert {vars(m.config)["data"].batch_size for m in group.members} == {2}
    assert group.memory == 1e9
    other = parse(
        "--grid", "lora.alpha=4,16", "lora.targets=**/query/kernel;**/key/kernel all-linear"
    )
    assert called(other) == [
        "alpha=4,targets=query",
        "alpha=4,targets=key+all-linear",
        "alpha=16,targets=query",
        "alpha=16,targets=key+all-linear",
    ]
    assert other.members[1].config.lora.targets == ("**/key/kernel", "all-linear")


def test_the_command_line_of_tasks() -> None:
    group = parse("--r8.lora.rank", "2", "--only", "r8", "reviews", config=TASKS)
    assert called(group) == ["reviews", "r8", "r52", "newsgroups"]
    assert [group.waits(m) for m in group.members] == [False, False, True, True]
    untouched = parse(config=TASKS)
    changed = [
        (one.name, one.config.lora.rank, two.config.lora.rank)
        for one, two in zip(untouched.members, group.members, strict=True)
        if one.config != two.config
    ]
    assert changed == [("r8", 4, 2)]


def test_help_of_tasks_shows_the_fields_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help-all", config=TASKS)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "reviews, r8, r52, newsgroups, together" in text
    for option in ("--only", "--memory", "--run-dir", "--reviews.lora.rank"):
        assert f"{option} " in text
    assert "--r8.lora.rank" not in text


def test_help_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help-all")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for option in ("--grid", "--only", "--base.lora.rank", "--base.data.batch-size"):
        assert f"{option} " in text
    assert "lora.rank=1,2,4,8 optimizer.learning_rate=0.0005" in text


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--grid", "lora.rnk=1"), "error: grid: TextConfig has no field 'lora.rnk'"),
        (("--only", "rank=3"), "error: only: 'rank=3' matches no member; nearest: rank="),
        (("--base.fresh",), "error: base.fresh is set for the sweep as a whole: give --fresh"),
        (("--plan",), "error: --plan is for one run"),
    ],
)
def test_a_wrong_line_is_one_error(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    assert train.main(["--config", SWEEP, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(says)
    assert "Traceback" not in captured.err + captured.out


def test_a_grid_without_values_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--grid", "lora.rank")
    assert "'lora.rank' is not PATH=VALUE,VALUE" in capsys.readouterr().err
