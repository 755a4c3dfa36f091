"""A step has the loss, the gradient and the metrics that TRL has (tests/golden/make_trl.py)."""

import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from lora_jax import models
from lora_jax.adapters import Adapter
from lora_jax.data import DataConfig, Shard
from lora_jax.exchange import peft
from lora_jax.training import step
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.preferences import PreferenceConfig, preferences
from lora_jax.training.text import ModelConfig, TextConfig
from lora_jax.training.workload import Workload

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
TRL = GOLDEN / "golden_trl"
EXPECTED = json.loads((TRL / "expected.json").read_text())
SETTINGS: dict[str, dict[str, Any]] = {
    "robust": {"smoothing": 0.2},
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.75},
}
NAMES = {f"rewards/{what}" for what in ("chosen", "rejected", "accuracies", "margins")}
NAMES |= {"logps/chosen", "logps/rejected"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The base of the steps with their tokenizer, and their rows as a validation split."""
    folder = tmp_path_factory.mktemp("trl")
    shutil.copytree(GOLDEN / "golden_models" / "llama", folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TRL / name, folder / "base")
    for rows in TRL.glob("*.jsonl"):
        for split in ("train", "validation"):
            shutil.copy(rows, folder / f"{rows.stem}-{split}.jsonl")
    return folder


def workload_of(name: str, folder: pathlib.Path) -> Workload:
    rows = {"sft": "answers", "kto": "judged"}.get(name, "pairs")
    common: dict[str, Any] = {
        "model": ModelConfig(reference=str(folder / "base")),
        "data": DataConfig(
            str(folder / f"{rows}-{{split}}.jsonl"), max_length=16, buckets=(16,), eval_batch_size=6
        ),
    }
    if name == "sft":
        return causal_lm(TextConfig(workload=causal_lm, **common))
    common |= {"beta": 0.3, "preference": name, **SETTINGS.get(name, {})}
    return preferences(PreferenceConfig(workload=preferences, **common))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", EXPECTED)
def test_a_step_is_that_of_trl(name: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    made, expected = workload_of(name, folder), EXPECTED[name]
    assert made.load is not None
    params = made.load(None)
    (batch,) = made.evaluation["validation"](Shard())
    names = models.hf_names(models.open(str(folder / "base")).config)
    apply = functools.partial(made.apply, train=False, key=None)

    def adapter(tensors: pathlib.Path) -> Adapter:
        """Read an adapter, or the gradient of one, which has the same form."""
        shutil.copy(TRL / "policy" / "adapter_config.json", tmp_path)
        shutil.copy(tensors, tmp_path / "adapter_model.safetensors")
        return peft.load(tmp_path, names, apply, params, batch)

    policy, reference = (adapter(TRL / f"{n}/{peft.TENSORS}") for n in ("policy", "reference"))
    layout = policy.layout
    if made.reference is not None:
        start = {"base": {}, "adapters": reference.parameters}
        batch = {**batch, "reference": step.reference_step(made, layout)(start, params, batch)}
    evaluate = step.evaluation_step(made, layout)

    def objective(adapters: Any) -> Any:
        found = evaluate({"base": {}, "adapters": adapters}, params, batch)
        return found.total / found.weight, found

    (loss, found), slopes = jax.jit(jax.value_and_grad(objective, has_aux=True))(policy.parameters)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-4)
    scores = made.scores(found.sums, float(found.weight))
    assert scores.keys() >= NAMES or name in ("sft", "kto")
    for key in scores.keys() & expected.keys():
        np.testing.assert_allclose(scores[key], expected[key], rtol=1e-4, atol=1e-5, err_msg=key)
    theirs = adapter(TRL / f"{name}.safetensors").parameters
    largest = max(float(abs(x).max()) for x in jax.tree.leaves(theirs))
    near = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4 * largest)
    jax.tree.map(near, slopes, theirs)
