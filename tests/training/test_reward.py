"""Reward models: a decoder with one output, trained on pairs of answers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import serving
from lora_jax.cli import export
from lora_jax.data import DataConfig, Shard
from lora_jax.training.config import ConfigError, LoraConfig, OptimizerConfig
from lora_jax.training.reward import RewardConfig, loss, reward
from lora_jax.training.text import ModelConfig, SamplesConfig
from tests.training import runs, tiny

END = "word13"  # it ends a text of the tiny decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny decoder, and pairs of which the better answer repeats the word that was asked for."""
    folder = tmp_path_factory.mktemp("reward")
    tiny.write_model(folder / "base", {**tiny.LLAMA, "num_hidden_layers": 1})
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    random = np.random.default_rng(0)
    for split, count in (("train", 64), ("validation", 16)):
        rows = []
        for _ in range(count):
            one, other = (f"word{i}" for i in random.choice(12, 2, replace=False))
            rows.append({"prompt": one, "chosen": f" {one}", "rejected": f" {other} {other}"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(folder: pathlib.Path) -> RewardConfig:
    return RewardConfig(
        workload=reward,
        model=ModelConfig(reference=str(folder / "base")),
        data=DataConfig(
            str(folder / "{split}.jsonl"), max_length=8, batch_size=8, eval_batch_size=8
        ),
        lora=LoraConfig(rank=2, alpha=4.0, targets=("**/attention/*/kernel",)),
        optimizer=OptimizerConfig(learning_rate=2e-2),
        steps=20,
        evaluate_every=20,
    )


def test_better_answers_are_given_more(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """A run learns to, and `predict` gives a text the reward that training evaluated."""
    summary = runs.train_in(tmp_path / "run", config_of(folder))
    after = summary["after"]["validation"]
    assert after["loss"] < 0.8 * summary["before"]["validation"]["loss"]
    server = serving.open(tmp_path / "run/adapters/best")
    lines = (folder / "validation.jsonl").read_text().splitlines()
    found = []
    for row in map(json.loads, lines):
        texts = [f"{row['prompt']}{row[side]} {END}" for side in ("chosen", "rejected")]
        found.append([answer["prediction"] for answer in server.predict(texts)])
    chosen, rejected = np.transpose(found)
    assert after["accuracy"] == pytest.approx(np.mean(chosen > rejected))
    assert after["margin"] == pytest.approx(np.mean(chosen - rejected), abs=1e-5)
    assert after["mean_reward"] == pytest.approx(np.mean(found), abs=1e-5)
    out = tmp_path / "peft"
    assert export.main([str(tmp_path / "run"), "--format", "peft", "--out", str(out)]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_the_loss_is_that_of_bradley_and_terry() -> None:
    rewards = jnp.array([[1.0, -0.5], [0.2, 0.7], [9.0, 9.0]])
    batch = {"weight": jnp.array([1.0, 1.0, 0.0])}
    each = [np.log1p(np.exp(-1.5)) + 0.1 * 0.25, np.log1p(np.exp(0.5)) + 0.1 * 0.81]
    found = loss(0.1, rewards, batch)
    np.testing.assert_allclose(found.total, sum(each), rtol=1e-6)
    assert (float(found.weight), float(found.sums["accuracy"])) == (2.0, 1.0)


def test_a_reward_depends_on_its_answer_alone(folder: pathlib.Path) -> None:
    """Neither padding nor the tokens after it change it."""
    made = reward(config_of(folder))
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = made.arrays(jax.tree.map(lambda _: where, made.params))
    batch = next(iter(made.train(Shard())))
    plain = made.apply(params, batch, train=False, key=None)
    noise = np.where(batch["mask"], batch["input_ids"], 7)
    changed = made.apply(params, {**batch, "input_ids": noise}, train=False, key=None)
    np.testing.assert_allclose(changed, plain, rtol=1e-5, atol=1e-6)
    last = batch["input_ids"][0, 0][batch["mask"][0, 0]][-1]
    assert last == tiny.tokenizer(pair=False).token_to_id(END)


def test_settings_that_a_reward_model_does_not_have(folder: pathlib.Path) -> None:
    config = config_of(folder)
    with pytest.raises(ConfigError, match=r"samples\.prompts must be 0 for a reward model"):
        reward(type(config)(**{**vars(config), "samples": SamplesConfig(prompts=1)}))
    with pytest.raises(lora_jax.LoraError, match="'acc', but an evaluation gives"):
        reward(type(config)(**{**vars(config), "select": "acc"}))
