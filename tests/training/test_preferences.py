"""Learning from pairs of answers: the losses, the reference, the batches."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.data import DataConfig, DataError, Shard
from lora_jax.data.example_reader import Words
from lora_jax.data.preferences import preferences as pairs_of
from lora_jax.sweeps.config import GroupConfig, Member
from lora_jax.training import causal_lm, dry_run, export, loop, reference_cache
from lora_jax.training.config import ConfigError, LoraConfig, OptimizerConfig
from lora_jax.training.preference_losses import FREE, Answers, LossName, Strength, loss_of
from lora_jax.training.preferences import PreferenceConfig, loss, preferences
from lora_jax.training.text import ModelConfig
from tests.sweeps.test_group_step import close
from tests.training import runs, tiny

ZERO = {
    "sigmoid": np.log(2),
    "robust": np.log(2),
    "hinge": 1.0,
    "ipo": 1 / (4 * 0.3**2),
    "apo_zero": 1.0,
    "nca_pair": 2 * np.log(2),
    "kto": 0.5,
}


LOSSES: tuple[Any, ...] = get_args(LossName)


def test_every_loss_has_a_row_below() -> None:
    assert set(ZERO) | set(FREE) == set(LOSSES)


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_loss_without_a_difference(name: Any, smoothing: float) -> None:
    zero, tokens = jnp.zeros(1), jnp.ones(1) * 3
    found = loss_of(name, Answers(zero, zero, tokens, tokens), Strength(0.3, smoothing))
    np.testing.assert_allclose(found, ZERO[name], rtol=1e-6)


def written_out(name: str, c: float, r: float, n: tuple[int, int], beta: float, e: float) -> float:
    """The formulas of the papers, in float64 and without care for rounding."""
    s = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    d, (up, down) = c - r, (c / n[0], r / n[1])
    odds = np.log(np.exp(up) / (1 - np.exp(up))) - np.log(np.exp(down) / (1 - np.exp(down)))
    a, b = -np.log(s(beta * d)), -np.log(s(-beta * d))
    return float(
        {
            "sigmoid": lambda: (1 - e) * a + e * b,
            "robust": lambda: ((1 - e) * a - e * b) / (1 - 2 * e),
            "hinge": lambda: max(0, 1 - beta * d),
            "ipo": lambda: (up - down - 1 / (2 * beta)) ** 2,
            "apo_zero": lambda: 1 - s(beta * c) + s(beta * r),
            "nca_pair": lambda: (
                -np.log(s(beta * c)) - (np.log(s(-beta * c)) + np.log(s(-beta * r))) / 2
            ),
            "kto": lambda: 1 - s(beta * d),
            "orpo": lambda: -up - beta * np.log(s(odds)),
            "simpo": lambda: -np.log(s(beta * (up - down) - 0.5)),
        }[name]()
    )


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_those_of_the_papers(name: Any) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        c, r = -random.exponential(5, 2)
        n = tuple(random.integers(1, 9, 2).tolist())
        given = Answers(*(jnp.array([x], jnp.float32) for x in (c, r, *n)))
        found = loss_of(name, given, Strength(0.3, 0.1, 0.5))
        np.testing.assert_allclose(found[0], written_out(name, c, r, n, 0.3, 0.1), rtol=2e-4)


def test_the_odds_of_a_sure_answer_are_finite() -> None:
    sure = Answers(*(jnp.array([x], jnp.float32) for x in (-1e-9, -90.0, 1, 1)))
    slope = jax.grad(lambda x: loss_of("orpo", x, Strength())[0])(sure)
    assert np.isfinite([float(x[0]) for x in slope[:2]]).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A base, and pairs whose better answer repeats the word of the prompt."""
    folder = tmp_path_factory.mktemp("preferences")
    tiny.write_model(folder / "base", tiny.LLAMA)
    (folder / "base" / "tokenizer_config.json").write_text('{"eos_token": "word13"}')
    random = np.random.default_rng(0)
    rows = []
    for _ in range(64):
        one, other = (f"word{i}" for i in random.choice(12, 2, replace=False))
        rows.append({"prompt": one, "chosen": f" {one}", "rejected": f" {other} {other}"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(folder: pathlib.Path, **changes: Any) -> PreferenceConfig:
    config = PreferenceConfig(
        workload=preferences,
        model=ModelConfig(reference=str(folder / "base")),
        data=DataConfig(
            str(folder / "pairs.jsonl"), max_length=8, batch_size=8,
            eval_batch_size=8, eval_share=0.25,
        ),
        lora=LoraConfig(rank=2, alpha=4.0, targets=("layers_*/attention/*/kernel",)),
        optimizer=OptimizerConfig(learning_rate=2e-2),
        beta=0.5,
        steps=20,
        evaluate_every=10,
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


@pytest.mark.slow
def test_the_reference_is_the_model_as_the_run_begins(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A first run begins at ln 2; one that begins with its adapter begins at ln 2 again, and both
    learn. An implementation with two models has the same loss and rewards."""
    first = runs.train_in(tmp_path / "first", config_of(folder))
    before, after = (first[k]["validation"] for k in ("before", "after"))
    np.testing.assert_allclose(before["loss"], np.log(2), rtol=1e-6)
    assert before["rewards/margins"] == 0
    assert after["loss"] < 0.6
    assert after["rewards/margins"] > 0.1
    assert SavedAdapter.open(tmp_path / "first/adapters/best").about["eos"] == "word13"
    later = config_of(folder, start_from=str(tmp_path / "first"))
    second = runs.train_in(tmp_path / "second", later)
    np.testing.assert_allclose(second["before"]["validation"]["loss"], np.log(2), rtol=1e-6)
    assert second["before"]["validation"]["logps/chosen"] == pytest.approx(
        after["logps/chosen"], rel=1e-5
    )


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_reference(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A run of 10 steps that is extended to 20 ends as one of 20 steps, bit for bit."""
    constant = OptimizerConfig(learning_rate=2e-2, schedule="constant", warmup=0.0)
    config = config_of(folder, optimizer=constant)
    runs.train_in(tmp_path / "half", dataclasses.replace(config, steps=10))
    continued = runs.train_in(tmp_path / "half", config)
    whole = runs.train_in(tmp_path / "whole", config)
    assert continued["after"] == whole["after"]


@pytest.fixture
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A cache of its own, in which a run leaves one file of references."""
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def files(cache: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("name", ["sigmoid", pytest.param("kto", marks=pytest.mark.slow)])
def test_a_cached_reference_is_a_second_pass(
    name: LossName, folder: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run is the same bit for bit without a cache, with an empty one, and with a full one, which
    takes no second pass; of another data set nothing is known."""
    data = dataclasses.replace(config_of(folder).data, buckets=(4, 8))
    plain = config_of(folder, preference=name, data=data, steps=8, evaluate_every=4)
    runs.train_in(tmp_path / "plain", dataclasses.replace(plain, cached_reference=False))
    assert not files(cache)
    runs.train_in(tmp_path / "empty", plain)
    (file,) = files(cache)
    content = file.read_bytes()
    monkeypatch.setattr(loop.Loop, "_second_pass", lambda *_: pytest.fail("a second pass"))
    runs.train_in(tmp_path / "full", plain)
    assert file.read_bytes() == content
    for run in ("empty", "full"):
        runs.assert_same_run(tmp_path / "plain", tmp_path / run, 8)
    other = dataclasses.replace(plain, data=dataclasses.replace(data, max_length=6, buckets=(6,)))
    with pytest.raises(pytest.fail.Exception, match="a second pass"):
        runs.train_in(tmp_path / "other", other)


@pytest.mark.slow
def test_another_base_or_adapter_has_another_cache(
    folder: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path
) -> None:
    short = config_of(folder, steps=2, evaluate_every=2)
    runs.train_in(tmp_path / "first", short)
    runs.train_in(tmp_path / "beta", dataclasses.replace(short, beta=0.1, preference="ipo"))
    assert len(files(cache)) == 1
    runs.train_in(
        tmp_path / "later", dataclasses.replace(short, start_from=str(tmp_path / "first"))
    )
    assert len(files(cache)) == 2
    half = dataclasses.replace(short.model, param_dtype="bfloat16")
    runs.train_in(tmp_path / "half", dataclasses.replace(short, model=half))
    assert len(files(cache)) == 3


SLOW = ("cut", "positive", "nan", "link", "fifo", "others")
ATTACKS = ["changed", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def forged(content: bytes, value: float) -> bytes:
    """The file with other values, and the right SHA-256."""
    rows = np.frombuffer(content[32:], reference_cache._RECORD).copy()
    rows["value"] = value
    return hashlib.sha256(rows.tobytes()).digest() + rows.tobytes()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_cache_is_not_used(
    attack: str, folder: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The run says so, and computes the reference; the file is left as it is."""
    config = config_of(folder, steps=2, evaluate_every=2)
    expected = runs.train_in(tmp_path / "first", config)
    (file,) = files(cache)
    content = file.read_bytes()
    file.unlink()
    if attack == "link":
        (tmp_path / "secret").write_bytes(content)
        file.symlink_to(tmp_path / "secret")
    elif attack == "fifo":
        os.mkfifo(file)
    else:
        changed = content[:-1] + bytes([content[-1] ^ 1])
        forgeries = {"changed": changed, "cut": content[:-24], "others": content}
        signs = {"positive": 1.0, "nan": np.nan}
        file.write_bytes(
            forgeries[attack] if attack not in signs else forged(content, signs[attack])
        )
    if attack == "others":
        file.parent.chmod(0o777)
    found = runs.train_in(tmp_path / "second", config, console=train.Console())
    out = capsys.readouterr().out
    assert "note: the reference is computed for each batch" in out and str(file.parent) in out
    assert found["after"] == expected["after"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("name", ["sigmoid", pytest.param("kto", marks=pytest.mark.slow)])
def test_members_of_a_group_share_the_reference(
    name: LossName, folder: pathlib.Path, tmp_path: pathlib.Path, cache: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Members that differ in beta and in the loss leave what they leave alone. Each example is
    scored once by the reference, so K runs cost (2 K + 1) / 3 K of K single ones, or less."""
    short = config_of(folder, preference=name, steps=8, evaluate_every=4)
    members = {"a": short, "b": dataclasses.replace(short, beta=0.1, undesirable_weight=0.5)}
    members["seed"] = dataclasses.replace(short, seed=1)
    if name != "kto":
        members["ipo"] = dataclasses.replace(short, preference="ipo")
    scored, plain = [], reference_cache.ReferenceCache.values

    def values(self: Any, batch: Any, refer: Any) -> Any:
        return plain(self, batch, lambda rows: (scored.append(1), refer(rows))[1])

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache.ReferenceCache, "values", values)
        group = [Member(name, config) for name, config in members.items()]
        runs.train_group(tmp_path / "group", GroupConfig(members=tuple(group)))
    if name == "sigmoid":  # the 48 pairs to learn in the orders of two seeds, and the 16 others
        assert len(scored) <= 6 + 6 + 2
    for name, config in members.items():
        runs.train_in(tmp_path / name, dataclasses.replace(config, cached_reference=False))
        found, expected = (
            export.load(tmp_path / path / name if path else tmp_path / name, "last")
            for path in ("group", "")
        )
        close(found, expected)
        one, other = (
            json.loads((tmp_path / path / name / "summary.json").read_text())["after"]
            for path in ("group", "")
        )
        assert one["validation"] == pytest.approx(other["validation"], rel=1e-4, abs=1e-5)


def test_a_group_whose_members_change_the_reference(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    pissa = config_of(folder, lora=LoraConfig(rank=2, alpha=4.0, init="pissa"))
    with pytest.raises(ConfigError, match=r"reference, .* got lora.init 'pissa' and 0 parameters"):
        runs.train_group(tmp_path / "group", GroupConfig(members=(Member("a", pissa),)))


def test_the_reference_of_a_dry_run(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss is that of the first step, ln 2."""
    dry_run.run(config_of(folder), train.Console())
    assert re.search(r"loss +0\.6931", capsys.readouterr().out)


@pytest.mark.parametrize("name", ["sigmoid", "kto"])
def test_loss_and_gradient_are_those_of_two_models(name: LossName, folder: pathlib.Path) -> None:
    """The reference is computed here by another copy of the model, from whole logits."""
    config = config_of(folder, preference=name, undesirable_weight=0.5)
    made = preferences(config)
    params = made.load(None) if made.load is not None else made.params
    batch = next(iter(made.train(Shard())))
    other = jax.tree.map(lambda x: x * 1.1, params)

    def direct(policy: Any, reference: Any) -> jax.Array:
        def logps(params: Any) -> jax.Array:
            model = causal_lm.models.DecoderModel(
                config.model.apply_to(causal_lm.models.open(config.model.reference).config)
            )
            ids = batch["input_ids"].reshape(-1, batch["input_ids"].shape[-1])
            logits = jax.nn.log_softmax(model.apply({"params": params}, ids))
            targets = batch["targets"].reshape(ids.shape)
            chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
            return (chosen.reshape(batch["targets"].shape) * batch["loss_weight"]).sum(-1)

        ratio = logps(policy) - logps(reference)
        if name == "kto":
            far = jax.lax.stop_gradient(jnp.maximum(0, ratio[:, 1].mean()))
            good = jax.nn.sigmoid(0.5 * (far - ratio[:, 0]))
            return jnp.mean(jnp.where(batch["good"] == 1, good, 0.5 * (1 - good)))
        return -jnp.mean(jax.nn.log_sigmoid(0.5 * (ratio[:, 0] - ratio[:, 1])))

    def ours(policy: Any) -> jax.Array:
        assert made.reference is not None
        start = made.apply(other, batch, train=False, key=None)
        full = {**batch, "reference": made.reference(start, batch)}
        found = loss(config, made.apply(policy, full, train=True, key=None), full)
        return found.total / found.weight

    expected, slopes = jax.jit(jax.value_and_grad(direct))(params, other)
    got, found = jax.jit(jax.value_and_grad(ours))(params)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max() + 1e-6)),
        found,
        slopes,
    )


def test_pairs_that_are_none(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "word1"}\n')
    words = causal_lm.words_of(causal_lm.models.open(str(folder / "base")))()
    with pytest.raises(DataError, match=r"texts.jsonl:1: .*form 'text'; .* chosen and rejected"):
        pairs_of(DataConfig(str(tmp_path / "texts.jsonl")), words, "train", 2)
    with pytest.raises(ConfigError, match=r"smoothing must be below 0\.5"):
        config_of(folder, preference="robust", smoothing=0.6)


def test_a_pair_is_whole_or_left_out(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rows = [
        {"prompt": "word1", "chosen": " word2", "rejected": " word3 word4"},
        {"prompt": "word1 " * 9, "chosen": " word2", "rejected": " word3"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words: Words = causal_lm.words_of(causal_lm.models.open(str(folder / "base")))()
    config = DataConfig(str(path), eos="word13", max_length=8)
    batches = pairs_of(config, words, "train", 2)
    (batch,) = list(batches)
    assert batch["weight"].tolist() == [1, 0]  # the second row only fills the batch
    assert batch["loss_weight"][0].sum(-1).tolist() == [2, 3]  # with the end
    assert batches.facts().examples == 1


def judged_rows(folder: pathlib.Path, tmp_path: pathlib.Path) -> tuple[DataConfig, Words]:
    """Five answers, of which the first two are good, and the words of the base."""
    rows = [
        {"prompt": f"word{i} " * (i + 1), "completion": f" word{9 - i}" * (5 - i), "label": i < 2}
        for i in range(5)
    ]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(str(tmp_path / "judged.jsonl"), eos="word13", max_length=8, buckets=(6, 8))
    return config, causal_lm.words_of(causal_lm.models.open(str(folder / "base")))()


def test_a_judged_answer_comes_with_that_before_it(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Its prompt is followed by the answer before it in the batch, cut to the longest row."""
    config, words = judged_rows(folder, tmp_path)
    (batch,) = pairs_of(config, words, "train", 6, judged=True)
    names = lambda ids: words.tokenizer.decode(ids.tolist()).split()  # noqa: E731
    assert batch["good"].tolist() == [1, 1, 0, 0, 0, 1]
    assert batch["weight"].tolist() == [1, 1, 1, 1, 1, 0]
    own, other = batch["input_ids"][1]
    assert names(own)[:6] == ["word1"] * 2 + ["word8"] * 4
    assert names(other)[:7] == ["word1"] * 2 + ["word9"] * 5
    assert batch["loss_weight"][1].sum(-1).tolist() == [5, 6]  # with the end
    assert names(batch["input_ids"][0, 1])[:2] == ["word0", "word5"]  # the last is before the first
    assert batch["input_ids"].shape == (6, 2, 8)


def test_parts_of_a_batch_of_judged_answers(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Two processes together have the batch that one has."""
    config, words = judged_rows(folder, tmp_path)
    batches = pairs_of(config, words, "train", 4, judged=True, shuffle=True)
    halves = [batches.iterator(Shard((i,), 2)) for i in range(2)]
    for whole, *parts in zip(batches, *halves, strict=True):
        for name, value in whole.items():
            np.testing.assert_array_equal(value, np.concatenate([part[name] for part in parts]))


def test_judged_answers_are_learned(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """KTO begins at 1/2 and tells good answers from bad ones; pairs are taken apart."""
    summary = runs.train_in(tmp_path / "run", config_of(folder, preference="kto"))
    before, after = (summary[k]["validation"] for k in ("before", "after"))
    np.testing.assert_allclose(before["loss"], 0.5, rtol=1e-6)
    assert before["kl"] == 0
    assert after["loss"] < 0.48
    assert after["rewards/chosen"] > after["rewards/rejected"]
    config, words = judged_rows(folder, tmp_path)
    with pytest.raises(DataError, match=r"form 'judged' \(--preference kto learns from them\)"):
        pairs_of(config, words, "train", 2)
