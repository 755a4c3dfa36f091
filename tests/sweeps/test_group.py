"""Whole groups on tiny models: each member leaves the same files as in a run alone."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from lora_jax.data.config import DataConfig
from lora_jax.sweeps.config import GroupConfig, Member
from lora_jax.training import metrics
from lora_jax.training.classification import classification
from lora_jax.training.config import ConfigError, LoraConfig, MeshConfig, OptimizerConfig
from lora_jax.training.text import ModelConfig, TextConfig
from tests.sweeps.test_group_step import close
from tests.training import tiny
from tests.training.runs import saved_state, train_group, train_in

# Orbax warns that it takes the sharding from the file; two CPU arrays have no other.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sharding info not provided")]

STEPS = 50
QUERY, BOTH = ("**/query/kernel",), ("**/attention/{query,value}/kernel",)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> tuple[Member, ...]:
    """Members that differ in all that members may differ in; `short` ends before the others."""
    folder = tmp_path_factory.mktemp("group")
    weights = tiny.write_model(folder / "roberta", tiny.ROBERTA | {"num_hidden_layers": 1})
    three = tiny.write_examples(folder / "three", ("text",), int)
    two = tiny.write_examples(folder / "two", ("text",), lambda kind: min(kind, 1))

    def member(
        name: str, source: str, rows: int, lora: LoraConfig, optimizer: OptimizerConfig, **rest: Any
    ) -> Member:
        length = rest.pop("length", 16)
        data = DataConfig(source=source, max_length=length, batch_size=rows, eval_batch_size=16)
        config = TextConfig(
            workload=classification,
            model=ModelConfig(reference=str(weights)),
            data=data,
            lora=lora,
            optimizer=optimizer,
            **{"steps": STEPS, "evaluate_every": 25, "checkpoint_every": 20, **rest},
        )
        return Member(name, config)

    return (
        member("plain", three, 8, LoraConfig(2, 4.0, BOTH), OptimizerConfig(1e-2)),
        member(
            "two", two, 4, LoraConfig(4, 2.0, QUERY), seed=1,
            optimizer=OptimizerConfig(3e-3, None, "cosine", 0.2, weight_decay=0.1, clip=None),
        ),
        member(
            "short", three, 6, LoraConfig(1, 8.0, BOTH), seed=2, steps=30, length=6,
            optimizer=OptimizerConfig(2e-3, 1e-2, "constant", clip=0.2),
        ),
        member(
            "uniform", three, 8, LoraConfig(3, 3.0, BOTH, init="uniform"), seed=3,
            optimizer=OptimizerConfig(5e-3, b1=0.8, b2=0.99, eps=1e-6),
        ),
    )  # fmt: skip


def together(
    path: pathlib.Path, members: tuple[Member, ...], devices: int = 1, **options: Any
) -> list[dict[str, Any]]:
    config = GroupConfig(members=members, **options)
    return train_group(path, config, jax.devices()[:devices])


def alone(path: pathlib.Path, member: Member) -> dict[str, Any]:
    return train_in(path, member.config, jax.devices()[:1])


def losses(run: pathlib.Path) -> list[float]:
    return [line["loss"] for line in metrics.read(run)]


@pytest.fixture(scope="module")
def whole(
    members: tuple[Member, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, list[dict[str, Any]]]:
    """The folder and the summaries of a group that was never stopped."""
    path = tmp_path_factory.mktemp("whole")
    return path, together(path, members)


Whole = tuple[pathlib.Path, list[dict[str, Any]]]


@pytest.mark.parametrize("index", range(4))
def test_a_member_leaves_what_it_leaves_alone(
    index: int, whole: Whole, members: tuple[Member, ...], tmp_path: pathlib.Path
) -> None:
    """A member leaves the checkpoint, record, evaluations and summary that it leaves alone."""
    member, (path, summaries) = members[index], whole
    summary = alone(tmp_path / "alone", member)
    own, steps = path / member.name, member.config.steps
    close(saved_state(own, steps), saved_state(tmp_path / "alone", steps))
    lines, wanted = metrics.read(own), metrics.read(tmp_path / "alone")
    assert [line.keys() for line in lines] == [line.keys() for line in wanted]
    for line, other in zip(lines, wanted, strict=True):
        numbers = {name: value for name, value in other.items() if name != "split"}
        got = {name: line[name] for name in numbers}
        assert got == pytest.approx(numbers, rel=1e-5, abs=1e-7)
    assert summaries[index].keys() == summary.keys()
    for name in ("adapter_parameters", "trainable_parameters", "best_step", "optimizer_bytes"):
        assert summaries[index][name] == summary[name], name
    assert summaries[index]["merged_difference"] < 1e-5
    for name in ("adapters/best", "adapters/last", "curves.png", "config.json", "summary.json"):
        assert (own / name).exists(), name


def test_a_group_on_a_mesh(
    members: tuple[Member, ...], tmp_path: pathlib.Path, whole: Whole
) -> None:
    """On data 2 x fsdp 2 x tensor 2 a group has the losses of one device."""
    pair = tuple(dataclasses.replace(m, config=short(m.config, 6)) for m in members[:2])
    together(tmp_path, pair, 8, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    single = together(tmp_path / "single", pair)
    assert [summary["steps"] for summary in single] == [6, 6]
    for member in pair:
        got, wanted = (losses(path / member.name) for path in (tmp_path, tmp_path / "single"))
        np.testing.assert_allclose(got, wanted, rtol=1e-4)


def short(config: Any, steps: int) -> Any:
    return dataclasses.replace(config, steps=steps, evaluate_every=steps)


def test_members_whose_models_compute_other_things_are_refused(
    members: tuple[Member, ...], tmp_path: pathlib.Path
) -> None:
    """Members with different programs are refused."""
    config: Any = members[3].config
    model = dataclasses.replace(config.model, dropout=0.5)
    other = Member("other", dataclasses.replace(config, model=model))
    with pytest.raises(ConfigError, match="'plain' and 'other' are not the same program"):
        together(tmp_path, (members[0], other))


def test_members_of_another_base_are_refused(
    members: tuple[Member, ...], tmp_path: pathlib.Path
) -> None:
    config: Any = members[3].config
    copy = shutil.copytree(config.model.reference, tmp_path / "copy")
    model = dataclasses.replace(config.model, reference=str(copy))
    other = Member("other", dataclasses.replace(config, model=model))
    with pytest.raises(ConfigError, match="'plain' and 'other' do not have the same base"):
        together(tmp_path / "run", (members[0], other))


def test_a_regression_does_not_go_with_classes(
    members: tuple[Member, ...], tmp_path: pathlib.Path
) -> None:
    config: Any = members[3].config
    source = tiny.write_examples(tmp_path / "real", ("text",), lambda kind: kind / 2)
    data = dataclasses.replace(config.data, source=source, regression=True)
    other = Member("other", dataclasses.replace(config, data=data))
    with pytest.raises(ConfigError, match="differ in the entry 'label': int32"):
        together(tmp_path / "run", (members[0], other))
