"""Configs of one run, with targets in any order."""

from __future__ import annotations

import dataclasses

from lora_jax.sweeps.sweep import SweepConfig
from lora_jax.training import config_json
from lora_jax.training.config import Config, LoraConfig
from tests.formats import small


def with_targets(*targets: str) -> Config:
    return dataclasses.replace(small.config, lora=LoraConfig(2, 4.0, targets))


def test_the_order_of_targets_is_no_change() -> None:
    stored = config_json.to_dict(with_targets("first/kernel", "second/kernel"))
    assert config_json.changes(stored, with_targets("second/kernel", "first/kernel")) == []
    assert config_json.changes(stored, with_targets("second/kernel")) != []


def test_the_order_of_targets_counts_where_they_have_settings() -> None:
    stored = config_json.to_dict(with_targets("first/kernel@rank=1", "*/kernel"))
    assert config_json.changes(stored, with_targets("*/kernel", "first/kernel@rank=1")) != []


def test_a_later_field_changes_no_name() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Later(small.SmallConfig):
        more: int = 0

    fields = {f.name: getattr(small.config, f.name) for f in dataclasses.fields(small.config)}
    assert config_json.identity(Later(**fields)) == config_json.identity(small.config)
    assert config_json.identity(Later(**fields, more=1)) != config_json.identity(small.config)
    other = dataclasses.replace(small.config, mesh=dataclasses.replace(small.config.mesh, data=2))
    assert config_json.identity(other) == config_json.identity(small.config)  # an incidental field


def test_they_are_fields_of_a_sweep() -> None:
    grid = {"optimizer.loraplus_lr_ratio": "1,16", "optimizer.no_decay": "bias norm; "}
    members = SweepConfig(base=small.config, grid=grid).expand().members
    found = [(m.config.optimizer.loraplus_lr_ratio, m.config.optimizer.no_decay) for m in members]
    assert found == [(1, ("bias", "norm")), (1, ()), (16, ("bias", "norm")), (16, ())]
    assert members[0].name == "loraplus_lr_ratio=1,no_decay=bias+norm"
