"""One field chooses the method: its settings, run directories, the command line and groups."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax
from configs import minilm_reviews
from experiments.methods.config import MethodConfig, MethodTextConfig
from lora_jax.cli import train as command_line
from lora_jax.sweeps.config import GroupConfig, Member
from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.classification import classification
from lora_jax.training.config import ConfigError, LoraConfig
from lora_jax.training.config_json import changes, identity, to_dict
from lora_jax.training.text import ModelConfig, TextConfig
from tests.experiments.test_method_runs import config_of, train_in
from tests.training.runs import ROOT, train_group

# Orbax warns that it takes the sharding from the file; one CPU array has no other.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

LORA = MethodTextConfig.like(minilm_reviews.config)
BITFIT = dataclasses.replace(LORA, method=MethodConfig("bitfit"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "bitfit", "size": 8}, "method.size is a setting of houlsby, pfeiffer, "),
        ({"size": 8}, "method.size is a setting of .* and method.name is 'lora'"),
        ({"name": "pfeiffer", "drop": 1}, "method.drop is a setting of adapter_drop"),
        ({"name": "houlsby", "size": 0}, "method.size must be at least 1, got 0"),
        ({"name": "prefix_layer", "prefix": -1}, "method.prefix must be at least 0, got -1"),
    ],
)
def test_settings_of_another_method_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        MethodConfig(**settings)


def test_what_a_method_trains_is_not_said_twice() -> None:
    lora = LoraConfig(trainable=("classifier/**",))
    with pytest.raises(ConfigError, match=r"lora\.trainable is .*'bitfit' decides"):
        dataclasses.replace(BITFIT, lora=lora)


def test_nothing_of_lora_counts_beside_another_method() -> None:
    assert LORA.adaptation == LORA.lora
    assert LORA.lora.targets
    assert (BITFIT.adaptation.targets, BITFIT.adaptation.trainable) == ((), None)


def test_another_method_is_another_run() -> None:
    assert changes(to_dict(LORA), LORA) == []
    assert identity(BITFIT)["method"]["name"] == "bitfit"
    assert "method.name: 'bitfit' -> 'lora'" in changes(to_dict(BITFIT), LORA)


def test_the_command_line() -> None:
    line = ["--method.name", "adapter_drop", "--method.drop", "2", "--method.size", "16"]
    config: Any = command_line.parse(line, "experiments/paper/configs/method.py", ROOT)[1]
    assert config.method == MethodConfig("adapter_drop", size=16, drop=2)
    assert config.method.settings == {"size": 16, "drop": 2}


@pytest.mark.parametrize(
    ("method", "changes", "says"),
    [
        (MethodConfig("prefix_layer"), {}, r"'prefix_layer': .*--data.max-length to 48"),
        (MethodConfig("top_layers", top_layers=3), {}, "'top_layers': .* from 1 to 2, got 3"),
        (MethodConfig("houlsby"), {"scan_layers": True}, "'houlsby': .*model.scan_layers"),
        (MethodConfig("bitfit"), {"decoder": True}, "'bitfit': this model has no bias"),
        (MethodConfig("head"), {"decoder": True}, "'head': a decoder has no new head"),
        (MethodConfig("prefix_embedding"), {"decoder": True}, "'prefix_embedding': prefixes are"),
    ],
)
def test_what_does_not_go_with_the_model(
    method: MethodConfig, changes: dict[str, bool], says: str, folder: pathlib.Path
) -> None:
    kind = "llama" if changes.get("decoder") else "roberta"
    model = ModelConfig(str(folder / kind), scan_layers=changes.get("scan_layers", False))
    config = config_of(folder, method, model=model)
    data = dataclasses.replace(config.data, max_length=60)
    config = dataclasses.replace(config, data=data)
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        (causal_lm if kind == "llama" else classification)(config)


def test_lora_settings_beside_another_method_are_refused() -> None:
    """A config file may have `lora.*`, but on the command line or in a sweep it would be lost."""
    line = ["--method.name", "bitfit", "--lora.rank", "2"]
    with pytest.raises(ConfigError, match="the command line sets a field of lora"):
        command_line.parse(line, "experiments/paper/configs/method.py", ROOT)
    line = ["--base.method.name", "bitfit", "--base.lora.alpha", "2", "--grid", "seed=0,1"]
    with pytest.raises(ConfigError, match="the command line sets a field of lora"):
        command_line.parse(line, "experiments/paper/configs/methods.py", ROOT)
    with pytest.raises(ConfigError, match=r"lora\.rank sets a field of lora"):
        SweepConfig(base=BITFIT, grid={"lora.rank": (1, 2)})
    cases = ({"method.name": "bitfit"}, {"method.name": "pfeiffer", "method.size": 4}, {})
    assert len(SweepConfig(base=LORA, cases=cases).expand().members) == 3


def together(path: pathlib.Path, group: GroupConfig) -> list[dict[str, Any]]:
    return train_group(path, group, jax.devices()[:1])


@pytest.mark.slow
def test_a_sweep_is_its_members_alone(folder: pathlib.Path) -> None:
    base = config_of(folder, MethodConfig("pfeiffer", size=4))
    cases = tuple({"optimizer.learning_rate": 1e-2 / (1 + seed), "seed": seed} for seed in (0, 1))
    group = SweepConfig(base=base, cases=cases).expand()
    summaries = together(folder / "sweep", group)
    assert len({s["after"]["validation"]["loss"] for s in summaries}) == 2
    last = group.members[-1]
    alone = train_in(folder / "alone", last.config)["after"]["validation"]
    assert summaries[-1]["after"]["validation"] == pytest.approx(alone, rel=1e-3)
    found, want = (
        lora_jax.restore(where / "adapters/last").trainable
        for where in (folder / "sweep" / last.name, folder / "alone")
    )
    assert list(found) == list(want)
    for path in want:
        np.testing.assert_allclose(found[path], want[path], atol=2e-3)


def pair(folder: pathlib.Path, one: MethodConfig, two: MethodConfig) -> GroupConfig:
    configs: list[TextConfig] = [config_of(folder, one), config_of(folder, two)]
    return GroupConfig(members=tuple(Member(n, c) for n, c in zip("ab", configs, strict=True)))


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        (MethodConfig(), MethodConfig("bitfit"), "train different parameters .*or the method"),
        (
            MethodConfig("pfeiffer", size=2),
            MethodConfig("pfeiffer", size=4),
            "method must be the same for all members",
        ),
        (
            MethodConfig("prefix_embedding", prefix=1, infix=2),
            MethodConfig("prefix_embedding", prefix=2, infix=1),
            "'a' and 'b' are not the same program",
        ),
    ],
)
def test_other_methods_do_not_go_together(
    one: MethodConfig, two: MethodConfig, says: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        together(tmp_path / "group", pair(folder, one, two))
