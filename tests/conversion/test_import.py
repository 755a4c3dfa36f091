"""`lora-jax import`: a PEFT folder becomes a run, and the run computes what PEFT computes."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraError, models, paths
from lora_jax.__main__ import main
from lora_jax.checkpoint import adapter_path
from lora_jax.exchange import peft
from lora_jax.serving import served_adapters
from lora_jax.system import run_lock
from tests import npz
from tests.conversion import bases
from tests.serving import classifiers
from tests.training import tiny

Imported = Callable[..., pathlib.Path]
pytestmark = [pytest.mark.slow, pytest.mark.standard_promotion]


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("bert", "llama"):
        bases.base(folder, name)
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, models_folder: pathlib.Path) -> Imported:
    """Return the run of a golden adapter, which is imported once."""
    made: dict[tuple[str, ...], pathlib.Path] = {}

    def get(name: str, base: str, *arguments: str) -> pathlib.Path:
        key = (name, base, *arguments)
        if key not in made:
            out = tmp_path_factory.mktemp("runs") / name
            given = [bases.adapter(name), "--base", str(models_folder / base), "--out", str(out)]
            assert main(["import", *given, *arguments]) == 0
            made[key] = out
        return made[key]

    return get


def golden(name: str) -> tuple[list[list[int]], np.ndarray]:
    """Return the token ids and PEFT's logits."""
    arrays = npz.read(pathlib.Path(bases.adapter(name)) / "expected.npz")
    return arrays["input_ids"].tolist(), arrays["out"]


@pytest.mark.parametrize(("name", "base"), [("bert", "bert"), ("decoder_classifier", "llama")])
def test_a_classifier_predicts_as_peft(
    name: str, base: str, imported: Imported, tmp_path: pathlib.Path
) -> None:
    run = imported(name, base, "--labels", "x", "y", "z")
    ids, logits = golden(name)
    ids = [[i for i in row if i] for row in ids]  # without padding
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"text": bases.text(row)}) + "\n" for row in ids))
    arguments = ["--adapter", str(run), "--file", str(source), "--out", str(out)]
    assert main(["predict", *arguments]) == 0
    for line, wanted in zip(out.read_text().splitlines(), logits, strict=True):
        shares = np.exp(wanted) / np.exp(wanted).sum()
        found = json.loads(line)["probabilities"]
        assert list(found) == ["x", "y", "z"]
        np.testing.assert_allclose(list(found.values()), shares, atol=2e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_a_decoder_computes_what_peft_computes(
    scan: bool, imported: Imported, models_folder: pathlib.Path
) -> None:
    run = imported("plain", "llama", *(["--scan-layers"] if scan else []))
    ids, logits = golden("plain")
    served = served_adapters.BaseChoice().open([str(run)], "generate")
    assert served.config.scan_layers == scan

    def apply(params: Any, ids: Any) -> Any:
        return models.DecoderModel(served.config).apply({"params": params}, ids)

    (member,) = served.members
    got = jax.jit(lora_jax.adapt(member.layout, apply))(
        served.params, member.parameters, np.asarray(ids, np.int32)
    )
    np.testing.assert_allclose(got, logits, atol=1e-5)


def test_a_decoder_generates(imported: Imported, tmp_path: pathlib.Path) -> None:
    ids, logits = golden("plain")
    arguments = ["--adapter", str(imported("plain", "llama")), "--prompt", bases.text(ids[0])]
    out = tmp_path / "out.jsonl"
    assert main(["generate", *arguments, "--max-new-tokens", "1", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["text"].split() == [f"t{logits[0, -1].argmax()}"]


def test_modules_to_save_come_along(
    imported: Imported, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = imported("saved", "llama")
    saved = lora_jax.restore(run / "adapters/best").trainable
    assert sorted(saved) == ["lm_head/kernel", "norm/scale"]
    ids, logits = golden("saved")
    given = ["generate", "--adapter", str(run), "--prompt", bases.text(ids[1])]
    given += ["--max-new-tokens", "1", "--out", str(tmp_path / "out.jsonl")]
    assert main(given) == 0
    written = json.loads((tmp_path / "out.jsonl").read_text())["text"].split()
    assert written == [f"t{logits[1, -1].argmax()}"]
    assert main([*given, "--base-too"]) == 1
    assert main([*given, "--adapter", str(imported("plain", "llama"))]) == 1
    said = capsys.readouterr().err
    assert "run the base alone" in said and "open it alone" in said


def test_a_report_says_where_it_came_from(
    imported: Imported, models_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    run = imported("bert", "bert", "--labels", "x", "y", "z")
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report/report.md").read_text()
    for said in (bases.adapter("bert"), "PEFT 0.21.2", "Amplification factor", "attention/query"):
        assert said in text, said
    assert "Curves" not in text


def test_a_run_that_went_out_predicts_the_same(tmp_path: pathlib.Path, capsys: Any) -> None:
    weights = tiny.write_model(tmp_path / "model", tiny.ROBERTA)
    source = classifiers.examples(tmp_path / "data", lambda k: "abc"[k], ("line",))
    config = classifiers.config_of(weights, source, fields=("line",), pooling="roberta_head")
    run = classifiers.export_in(tmp_path / "run", config)
    out = ["--format", "peft", "--out", str(tmp_path / "peft")]
    assert main(["export", str(run), *out]) == 0
    assert main(["import", str(tmp_path / "peft"), "--out", str(tmp_path / "again")]) == 0
    answers = []
    for one in ("run", "again"):
        given, out = ["--adapter", f"a={tmp_path / one}"], tmp_path / f"{one}.jsonl"
        given += ["--file", str(tmp_path / "data/validation.jsonl"), "--out", str(out)]
        assert main(["predict", *given]) == 0
        answers.append(out.read_text())
    assert answers[0] and answers[0] == answers[1]
    names = models.hf_names(models.open(str(weights)).config, models.Head("cls", 3))
    adapter = lora_jax.restore(run / "adapters/best")
    out = {path: x for path, x in adapter.trainable.items() if "/out/" in path}
    peft.save(tmp_path / "silent", names, adapter._replace(trainable=out), base=str(weights))
    assert main(["import", str(tmp_path / "silent"), "--out", str(tmp_path / "none")]) == 1
    assert "Say it by --pooling:\n  mean: the mean of" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_folder_names_its_base_only_if_that_is_here(
    models_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub:some/one").mkdir(parents=True)
    shutil.copytree(bases.adapter("plain"), tmp_path / "adapter")
    file, out = tmp_path / "adapter/adapter_config.json", str(tmp_path / "run")
    settings = json.loads(file.read_text())
    for name, cure in (
        ("some/one", "--base hub:some/one@v2"),
        ("hub:some/one", "--base hub:some/one\n"),
        ("pypi:evil==1.0/model", "--base"),
        (None, "does not name its base"),
    ):
        file.write_text(json.dumps({**settings, "base_model_name_or_path": name, "revision": "v2"}))
        assert main(["import", str(tmp_path / "adapter"), "--out", out]) == 1
        assert cure in capsys.readouterr().err
    name = str(models_folder / "llama")
    file.write_text(json.dumps({**settings, "base_model_name_or_path": name}))
    assert main(["import", str(tmp_path / "adapter"), "--out", out]) == 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with more inputs than the adapter."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return tiny.write_model(folder, tiny.LLAMA | {"hidden_size": 32})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{models}", "--base", "{models}/llama"), r"has 0 adapters in sub-folders"),
        (("{models}/none", "--base", "{models}/llama"), "no folder .*none"),
        (("{plain}", "--base", "{models}/bert"), r"plain on the base .*bert: "),
        (("{dora}", "--base", "{wide}"), r"dora on the base .*/wide: (.|\n)*q_proj"),
        (("{bert}", "--base", "{models}/llama"), "no head .score.weight."),
        (("{plain}", "--base", "{models}/vit"), "image encoder"),
        (("{plain}", "--base", "{models}/nowhere"), "neither a folder nor"),
        (("{bert}", "--base", "{models}/bert", "--labels", "a", "b"), "2 names, .* 3 labels"),
        (("{bert}", "--base", "{models}/bert", "--labels", "a", "b", "a"), "a class twice"),
        (("{bert}", "--base", "{models}/bert", "--lengths", "8", "99"), "within 1 to 12"),
        (("{bert}", "--base", "{models}/bert", "--pooling", "mean"), "bert.pooler.dense"),
    ],
)
def test_what_cannot_be_imported(
    arguments: tuple[str, ...], said: str, wide: pathlib.Path, tmp_path: pathlib.Path, capfd: Any
) -> None:
    known = {name: bases.adapter(name) for name in ("plain", "dora", "bert")}
    known["models"], known["wide"] = str(bases.GOLDEN / "golden_models"), str(wide)
    given = [argument.format(**known) for argument in arguments]
    assert main(["import", *given, "--out", str(tmp_path / "runs/a")]) == 1
    assert re.search(said, capfd.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_one_import_at_a_time(
    models_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    """An import into a directory that another command is writing is refused, and writes nothing."""
    given = ["import", bases.adapter("plain"), "--base", str(models_folder / "llama")]
    with run_lock.hold(tmp_path / "run", LoraError("busy")):
        assert main([*given, "--out", str(tmp_path / "run")]) == 1
    assert "another process is writing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*given, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("left", ["adapters", "adapters/best.orbax-checkpoint-tmp/arrays"])
def test_a_killed_import_goes_on(
    left: str, models_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The same command replaces what a kill or a full disk has left of it."""
    (tmp_path / "run" / left).mkdir(parents=True)
    (tmp_path / "run/lock").touch()
    given = ["import", bases.adapter("plain"), "--base", str(models_folder / "llama")]
    assert main([*given, "--out", str(tmp_path / "run")]) == 0
    assert [path.name for path in (tmp_path / "run/adapters").iterdir()] == ["best"]


def test_a_run_is_not_overwritten(
    imported: Imported, models_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    run = shutil.copytree(imported("plain", "llama"), tmp_path / "run")
    given = ["import", bases.adapter("rslora"), "--base", str(models_folder / "llama")]
    before = lora_jax.restore(run / "adapters/best").layout
    assert main([*given, "--out", str(run)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert lora_jax.restore(run / "adapters/best").layout == before
    assert main([*given, "--out", str(run), "--overwrite"]) == 0
    assert lora_jax.restore(run / "adapters/best").layout != before
    (run / "checkpoints").mkdir()
    assert main([*given, "--out", str(run), "--overwrite"]) == 1
    assert "checkpoints" in capsys.readouterr().err


def test_an_encoder_without_a_head(
    models_folder: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    config = models.open(str(models_folder / "bert")).config
    layout, adapters, _ = lora_jax.restore(_bare(tmp_path, config))
    names = models.hf_names(config, root="bert/")
    peft.save(
        tmp_path / "peft",
        names,
        lora_jax.Adapter(layout, adapters),
        base=str(models_folder / "bert"),
        task_type="FEATURE_EXTRACTION",
    )
    assert main(["import", str(tmp_path / "peft"), "--out", str(tmp_path / "run")]) == 0
    assert "no classification head" in capsys.readouterr().err
    saved = lora_jax.restore(adapter_path.find_one(str(tmp_path / "run"))[1])
    assert saved.layout.targets == layout.targets and not saved.trainable


def _bare(folder: pathlib.Path, config: Any) -> pathlib.Path:
    def f(params: Any, ids: Any) -> Any:
        return models.Bert(config).apply({"params": params["bert"]}, ids)

    shapes, ids = {"bert": models.shapes(config)}, np.zeros((1, 2), np.int32)
    spec = lora_jax.LoraSpec(2, 2.0, ("**/query/kernel",))
    layout = lora_jax.resolve(spec, f, shapes, ids)
    assert set(paths.flatten(shapes)) > {t.path for t in layout.targets}
    adapter = lora_jax.Adapter(layout, lora_jax.init(jax.random.key(0), layout))
    lora_jax.save(folder / "bare", adapter)
    return folder / "bare"
