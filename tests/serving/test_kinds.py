"""Adapters of kinds other than LoRA, trained by train.py's code, are served and reported on."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from lora_jax import LoraError
from lora_jax.cli import report as command
from lora_jax.serving import served_adapters, text_classifier
from lora_jax.training.config_json import to_dict
from tests.serving import classifiers
from tests.training import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One run of two steps for each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    weights = tiny.write_model(folder / "model", tiny.ROBERTA | {"num_hidden_layers": 1})
    config = classifiers.config_of(weights, classifiers.examples(folder / "data", int))
    found = {}
    for kind in ("dora", "loha", "bias"):
        targets = ("**/attention/query/bias",) if kind == "bias" else config.lora.targets
        lora = dataclasses.replace(config.lora, kind=kind, targets=targets)
        own = dataclasses.replace(config, lora=lora)
        run = classifiers.train_in(folder / kind, own)
        (run / "config.json").write_text(json.dumps(to_dict(own)))
        found[kind] = run, own
    return found


@pytest.mark.parametrize("kind", ["dora"])
def test_predict_is_what_training_evaluates(runs: dict[str, Any], kind: str) -> None:
    run, config = runs[kind]
    served = served_adapters.BaseChoice().open([str(run)], "predict")
    made = text_classifier.TextClassifier(served, 16)
    (member,) = served.members
    assert {t.kind for t in member.layout.targets} == {kind}
    rows = (run.parent / "data/validation.jsonl").read_text().splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    found = dict(made.read(made.submit([0] * len(rows), texts)))
    wanted = classifiers.evaluated(run, config)
    for i in found:
        np.testing.assert_allclose(found[i], wanted[i], atol=1e-5 * np.abs(wanted[i]).max() + 1e-6)


def test_two_kinds_for_one_matrix_are_refused(runs: dict[str, Any]) -> None:
    paths = [str(runs[kind][0]) for kind in ("loha", "dora")]  # LoHa is served as plain factors
    served = served_adapters.BaseChoice().open(paths, "predict")
    with pytest.raises(LoraError, match=r"by the kind 'dora' in adapter 1, and by 'lora'"):
        assert served.stack()
    alone = served_adapters.BaseChoice().open([str(runs["bias"][0])], "predict")
    with pytest.raises(LoraError, match="'bias' has no factors"):
        assert alone.stack()


@pytest.mark.parametrize("kind", ["dora", "loha", "bias"])
def test_report(runs: dict[str, Any], kind: str) -> None:
    run, _ = runs[kind]
    assert command.main([str(run)]) == 0
    (page,) = run.rglob("*.md")
    text = page.read_text()
    assert ("effective rank" in text) == (kind != "bias")
    assert "cannot be analysed" not in text
