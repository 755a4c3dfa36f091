"""A classifier's guesses are in the record and the report, first the wrong ones."""

from __future__ import annotations

import dataclasses
import html
import json
from pathlib import Path

import pytest

from lora_jax.cli import report as command
from lora_jax.training.config import ConfigError
from lora_jax.training.config_json import to_dict
from lora_jax.training.text import SamplesConfig
from tests.serving import classifiers
from tests.training import tiny


def test_guesses_are_recorded_and_the_wrong_ones_come_first(tmp_path: Path) -> None:
    weights = tiny.write_model(tmp_path / "model", tiny.ROBERTA | {"num_hidden_layers": 1})
    config = classifiers.config_of(weights, classifiers.examples(tmp_path / "data", str))
    config = dataclasses.replace(config, samples=SamplesConfig(prompts=5))
    run = classifiers.train_in(tmp_path / "run", config)
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    found = json.loads((run / "summary.json").read_text())["samples"]
    rows = [json.loads(x) for x in (tmp_path / "data/validation.jsonl").read_text().splitlines()]
    labels = {row["text"]: row["label"] for row in rows}
    assert len(found) == 5 and all(labels[one["asked"]] == one["expected"] for one in found)
    assert all(one["after"].rpartition(" (")[0] in labels.values() for one in found)
    assert command.main([str(run)]) == 0
    (page,) = run.rglob("report.html")
    text = html.unescape(page.read_text())
    assert "Guesses of examples, first the wrong ones, of the validation split" in text
    wrong = [o for o in found if not o["after"].startswith(o["expected"])]
    right = [o for o in found if o not in wrong]
    places = [text.index(f">{one['asked']}<") for one in (*wrong, *right)]
    assert places == sorted(places)


def test_real_labels_have_no_guesses(tmp_path: Path) -> None:
    weights = tiny.write_model(tmp_path / "model", tiny.ROBERTA | {"num_hidden_layers": 1})
    config = classifiers.config_of(weights, classifiers.examples(tmp_path / "data", float))
    data = dataclasses.replace(config.data, regression=True)
    with pytest.raises(ConfigError, match=r"samples.prompts must be 0 with .* real labels"):
        config.workload(dataclasses.replace(config, data=data, samples=SamplesConfig(prompts=1)))
