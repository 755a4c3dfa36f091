"""`train.py --from RUN` begins a new run with the adapter of another."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import lora_jax
import train
from lora_jax import planner
from lora_jax.__main__ import main
from lora_jax.checkpoint import restore_layout
from lora_jax.cli.train import parse
from lora_jax.sweeps import loop
from lora_jax.sweeps.config import GroupConfig, Member
from lora_jax.training import earlier_adapter, mesh, metrics
from lora_jax.training.classification import classification
from lora_jax.training.config import ConfigError, LoraConfig
from lora_jax.training.text import ModelConfig, TextConfig
from tests import npz
from tests.conversion import bases
from tests.exchange.tiny import ADAPTERS
from tests.serving import classifiers
from tests.training import runs, tiny

LINEAR = ("--lora.rank", "3", "--lora.alpha", "5", "--lora.targets", "second/kernel")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run whose adapters differ from the ones that its config's file asks for."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    runs.run(folder, *runs.SMALL, *LINEAR)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, TextConfig]:
    """A classifier of three classes, and its config."""
    folder = tmp_path_factory.mktemp("exported")
    weights = tiny.write_model(folder / "model", tiny.ROBERTA)
    source = classifiers.examples(folder / "data", lambda kind: "abc"[kind])
    config = classifiers.config_of(weights, source)
    return classifiers.export_in(folder / "run", config), config


def validation(run: pathlib.Path) -> list[dict[str, Any]]:
    lines = [line for line in metrics.read(run) if line.get("split") == "validation"]
    return [{name: x for name, x in line.items() if name != "step"} for line in lines]


def test_a_run_begins_where_another_was_best(first: pathlib.Path, tmp_path: pathlib.Path) -> None:
    summary = runs.run(tmp_path / "run", *runs.SMALL, "--from", str(first))
    best = json.loads((first / "summary.json").read_text())["best_step"]
    assert validation(tmp_path / "run")[0] == validation(first)[best // 4]
    assert summary["steps"] == 12
    layouts = [restore_layout(p / "adapters/last") for p in (first, tmp_path / "run")]
    assert layouts[0] == layouts[1] and [t.rank for t in layouts[0].targets] == [3]
    assert json.loads((tmp_path / "run/config.json").read_text())["start_from"] == str(first)


def test_a_folder_that_was_saved_by_hand(first: pathlib.Path, tmp_path: pathlib.Path) -> None:
    adapter = lora_jax.restore(first / "adapters/best")
    lora_jax.save(tmp_path / "mine", adapter)
    arguments = ["--config", runs.OWN, *runs.SMALL, "--from", str(tmp_path / "mine")]
    assert train.main([*arguments, "--run-dir", str(tmp_path / "a"), "--steps", "1"]) == 1
    allowed = [*arguments, "--allow-other-base", "--run-dir", str(tmp_path / "b"), "--steps", "1"]
    assert train.main(allowed) == 0
    best = json.loads((first / "summary.json").read_text())["best_step"]
    assert validation(tmp_path / "b")[0] == validation(first)[best // 4]


@pytest.mark.slow
def test_an_imported_run_trains_on(tmp_path: pathlib.Path) -> None:
    """An imported adapter begins with the loss of the logits that PEFT has computed."""
    base, golden = bases.base(tmp_path, "bert"), npz.read(ADAPTERS / "bert/expected.npz")
    arguments = ["--base", str(base), "--labels", "b", "c", "a", "--out", str(tmp_path / "run")]
    assert main(["import", bases.adapter("bert"), *arguments]) == 0
    (tmp_path / "data").mkdir()
    texts = [bases.text(ids) for ids in golden["input_ids"].tolist()]
    lines = [json.dumps({"text": texts[i % 2], "label": "abc"[i % 3]}) for i in range(18)]
    for split in ("train", "validation"):
        (tmp_path / f"data/{split}.jsonl").write_text("\n".join(lines))
    source = str(tmp_path / "data/{split}.jsonl")
    config = classifiers.config_of(base, source, pooling="roberta_head")
    config = other(config, max_length=8, label_names=("b", "c", "a"), steps=1, evaluate_every=1)
    config = dataclasses.replace(config, start_from=str(tmp_path / "run"))
    classifiers.train_in(tmp_path / "on", config)
    shares = np.exp(golden["out"]) / np.exp(golden["out"]).sum(-1, keepdims=True)
    losses = [-np.log(shares[i % 2, "bca".index("abc"[i % 3])]) for i in range(18)]
    assert validation(tmp_path / "on")[0]["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def other(config: TextConfig, **changes: Any) -> TextConfig:
    """Return the config with changed settings of the model or the data."""
    of_model = {f.name for f in dataclasses.fields(ModelConfig)} & changes.keys()
    model = dataclasses.replace(config.model, **{n: changes.pop(n) for n in of_model})
    of_data = {f.name for f in dataclasses.fields(config.data)} & changes.keys()
    data = dataclasses.replace(config.data, **{n: changes.pop(n) for n in of_data})
    return dataclasses.replace(config, model=model, data=data, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scan_layers": True}, "--model.scan-layers False"),
        ({"pooling": "cls"}, "--model.pooling mean"),
        ({"quantize": "nf4"}, "trained on a base of floats, and here .* in nf4"),
        ({"label_names": ("c", "a", "b")}, "in another order.*--data.label-names"),
        ({"source": "{two}"}, r"'classifier/out/bias' of shape \[3\] in full; here that is \[2\]"),
        ({"reference": "{wide}"}, r"has shape \(32, 32\), the layout has \(16, 16\)"),
        ({"lora": LoraConfig(trainable=("classifier/out/bias",))}, "leaves them out.*\n.*kernel"),
    ],
)
def test_what_does_not_fit(
    changes: dict[str, Any], said: str, exported: tuple[Any, TextConfig], tmp_path: pathlib.Path
) -> None:
    run, config = exported
    if changes.get("source"):
        changes = {"source": classifiers.examples(tmp_path, lambda kind: "ab"[kind % 2])}
    if changes.get("reference"):
        wide = tiny.write_model(tmp_path / "wide", tiny.ROBERTA | {"hidden_size": 32})
        changes = {"reference": str(wide)}
    config = other(config, start_from=str(run), **changes)
    workload = classification(config)
    with pytest.raises(ConfigError, match=said):
        earlier_adapter.patterns(config, workload, earlier_adapter.find(config, workload))


def test_another_base_is_refused(exported: Any, tmp_path: pathlib.Path) -> None:
    run, config = exported
    changed = tiny.write_model(tmp_path / "model", {**tiny.ROBERTA, "layer_norm_eps": 1e-6})
    tensors = safetensors.numpy.load_file(changed / "model.safetensors")
    name = next(iter(tensors))
    tensors[name] = tensors[name] + 1
    safetensors.numpy.save_file(tensors, changed / "model.safetensors")
    config = other(config, reference=str(changed), start_from=str(run))
    with pytest.raises(lora_jax.LoraError, match="was trained on another base: 1 of"):
        classifiers.train_in(tmp_path / "on", config)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--lora.rank", "5"), "--lora.rank 5: with --from"),
        (("--lora.init", "uniform"), "--lora.init uniform: with --from"),
        (("--lora.dropout", "0.1"), None),
        (("--lora.trainable", "head/**"), None),
    ],
)
def test_the_command_line_leaves_the_layout_alone(
    arguments: tuple[str, ...], said: str | None, first: pathlib.Path
) -> None:
    given = ["--config", runs.OWN, "--from", str(first), *arguments]
    if said is None:
        assert parse(given, runs.OWN, runs.ROOT)[1].start_from == str(first)  # type: ignore[union-attr]
        return
    with pytest.raises(ConfigError, match=said):
        parse(given, runs.OWN, runs.ROOT)


def test_where_a_run_cannot_begin(first: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    """A run cannot begin from a missing folder, itself, another tool's folder, or several runs."""
    for start, path, said in (
        (tmp_path / "nowhere", tmp_path / "a", "there is no such folder"),
        (first, first, "this run would overwrite"),
        (first / "adapters/best", first, "this run would overwrite"),
        (bases.adapter("plain"), tmp_path / "a", "lora-jax import"),
    ):
        given = ["--config", runs.OWN, "--run-dir", str(path), "--fresh", "--from", str(start)]
        assert train.main(given) == 1
        assert said in capsys.readouterr().err
    assert not (tmp_path / "a/config.json").exists() and (first / "summary.json").exists()
    for name in ("b", "c"):
        shutil.copytree(first / "adapters", tmp_path / "many" / name / "adapters")
    given = ["--config", runs.OWN, "--run-dir", str(tmp_path / "a"), "--from"]
    assert train.main([*given, str(tmp_path / "many")]) == 1
    assert "holds 2 runs; name one of them" in capsys.readouterr().err


def test_groups_refuse_it(exported: Any, tmp_path: pathlib.Path) -> None:
    run, config = exported
    config = dataclasses.replace(config, start_from=str(run))
    group = GroupConfig(members=(Member("a", config),), run_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="'a' is a member of a group"):
        loop.run(group, mesh.make(config.mesh), tmp_path, train.Console(quiet=True))


def test_the_plan_has_the_adapters_own_ranks(first: pathlib.Path) -> None:
    _, config, options = parse(
        ["--config", runs.OWN, "--width", "16", "--from", str(first), "--plan"], runs.OWN, runs.ROOT
    )
    made = planner.make("own", config, dataclasses.replace(options, plan_devices=1))  # type: ignore[arg-type]
    assert made.runs["lora"].adapter_parameters == 3 * (16 + 16)
