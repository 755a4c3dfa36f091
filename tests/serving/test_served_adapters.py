"""A base and adapters on it, opened from folders."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax
from lora_jax import LoraError, models, paths
from lora_jax.checkpoint import adapter, adapter_path
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.cli import generate, predict
from lora_jax.report import update_analysis
from lora_jax.serving import served_adapters
from lora_jax.serving.served_adapters import BaseChoice
from tests.training import tiny

QUERY, UP = "bert/encoder/layer_{}/attention/query/kernel", "bert/encoder/layer_{}/mlp/up/kernel"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny.write_model(tmp_path_factory.mktemp("models") / "roberta", tiny.ROBERTA)


@pytest.fixture(scope="module")
def params(weights: pathlib.Path) -> Any:
    return {"bert": models.open(str(weights)).load()}


def random_adapter(params: Any, rank: int, *, targets: tuple[str, ...] = (QUERY,)) -> Any:
    """Return (layout, adapters) for both layers, with this rank and a scale that depends on it."""
    flat = paths.flatten(params)
    rows = [
        lora_jax.Target(path, flat[path].shape, (), (0,), (1,), rank, 2.0 * rank + 1)
        for path in (target.format(layer) for target in targets for layer in (0, 1))
    ]
    layout = lora_jax.Layout(tuple(rows))
    random = np.random.default_rng(rank)
    return layout, {
        t.path: lora_jax.Factors(
            *(jnp.asarray(random.normal(0, 0.2, s), jnp.float32) for s in (t.a_shape, t.b_shape))
        )
        for t in rows
    }


def save(folder: pathlib.Path, params: Any, reference: str, *, rank: int = 2, **model: Any) -> str:
    """Save an adapter as train.py exports it, and return its folder."""
    about = {"model": {"reference": reference, "scan_layers": False, **model}}
    lora_jax.save(
        folder,
        lora_jax.Adapter(
            *random_adapter(params, rank), {"classifier/out/kernel": jnp.ones((16, rank))}
        ),
        fingerprint=lora_jax.fingerprint(params),
        about=about,
    )
    return str(folder)


@pytest.fixture
def runs(tmp_path: pathlib.Path, params: Any, weights: pathlib.Path) -> pathlib.Path:
    """A folder of runs: one has best and last, one has last alone, and one has no adapter yet."""
    save(tmp_path / "a/adapters/best", params, str(weights), rank=1)
    save(tmp_path / "a/adapters/last", params, str(weights), rank=3)
    save(tmp_path / "b/adapters/last", params, str(weights), rank=2)
    (tmp_path / "c/checkpoints").mkdir(parents=True)
    (tmp_path / "c/config.json").write_text("{}")
    return tmp_path


def test_what_is_given_is_found(runs: pathlib.Path, monkeypatch: Any) -> None:
    def found(given: str) -> list[tuple[str, str]]:
        return [(name, str(path.relative_to(runs))) for name, path in adapter_path.find(given)]

    assert found(f"{runs}/a") == [("a", "a/adapters/best")]
    assert found(f"{runs}/b") == [("b", "b/adapters/last")]
    assert found(f"{runs}/a/adapters/last") == [("a", "a/adapters/last")]
    assert found(f"x={runs}/a") == [("x", "a/adapters/best")]
    assert found(str(runs)) == [("a", "a/adapters/best"), ("b", "b/adapters/last")]
    shutil.copytree(runs / "a/adapters/best", runs / "mine")
    assert found(f"{runs}/mine") == [("mine", "mine")]
    (runs / "a").rename(runs / "lr=1")
    assert found(f"{runs}/lr=1") == [("lr=1", "lr=1/adapters/best")]
    monkeypatch.chdir(runs / "b")
    assert adapter_path.find(".")[0][0] == "b"
    assert adapter_path.find("adapters/last")[0][0] == "b"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{}/d", r"no adapter at .*/d: there is no such folder(.|\n)*nearest in (.|\n)*  [abc]"),
        ("{}/c", "the run has not exported one yet"),
        ("{}/c/checkpoints", "the folder holds nothing; expected a folder that lora_jax.save"),
        ("{}/c/config.json", "it is a file; expected a folder"),
        ("x={}", r"holds 2 runs, which cannot all be called 'x'(.|\n)*x=.*/a\n"),
        ("={}/a", "given as PATH or NAME=PATH, got '=.*/a'"),
    ],
)
def test_a_path_without_an_adapter(given: str, said: str, runs: pathlib.Path) -> None:
    with pytest.raises(LoraError, match=said):
        adapter_path.find(given.format(runs))


def test_a_base_is_opened_with_all_that_is_on_it(
    runs: pathlib.Path, params: Any, weights: pathlib.Path
) -> None:
    served = served_adapters.BaseChoice().open([f"x={runs}/a", f"{runs}/b"], "predict")
    assert served.names == ("x", "b")
    jax.tree.map(np.testing.assert_array_equal, served.params, params)
    layout, stacked = served.stack()
    assert [t.rank for t in layout.targets] == [2, 2]
    for i, rank in enumerate((1, 2)):
        own, wanted = random_adapter(params, rank)
        jax.tree.map(np.testing.assert_array_equal, lora_jax.multi.unstack(own, stacked, i), wanted)
        assert served.members[i].trainable["classifier/out/kernel"].shape == (16, rank)
    assert served.members[0].about["model"]["reference"] == str(weights)


def test_settings_of_the_model_are_those_of_training(
    tmp_path: pathlib.Path, params: Any, weights: pathlib.Path
) -> None:
    """A base opened in bfloat16, as in training, has the fingerprint of its float32 weights."""
    given = save(tmp_path / "a", params, str(weights), dtype="bfloat16", param_dtype="bfloat16")
    served = served_adapters.BaseChoice().open([given], "predict")
    assert served.config.dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(served.params)} == {"bfloat16"}


def test_ids_by_name(runs: pathlib.Path) -> None:
    served = served_adapters.BaseChoice().open([str(runs)], "predict")
    assert [served.id_of(name, "here") for name in ("a", "b", "base")] == [
        0,
        1,
        lora_jax.multi.BASE,
    ]
    with pytest.raises(LoraError, match=r"here: no adapter is called 'bb'; nearest: 'b'"):
        served.id_of("bb", "here")
    with pytest.raises(LoraError, match=r"here does not say which adapter(.|\n)*  a\n  b\n"):
        served.id_of(None, "here")
    one = dataclasses.replace(served, members=served.members[:1])
    none = dataclasses.replace(served, members=())
    assert (one.id_of(None, "here"), none.id_of(None, "here")) == (0, lora_jax.multi.BASE)


def test_no_adapter_is_the_base_alone(weights: pathlib.Path, params: Any) -> None:
    served = served_adapters.BaseChoice(base=str(weights)).open([], "predict")
    assert served.members == ()
    jax.tree.map(np.testing.assert_array_equal, served.params, params)
    with pytest.raises(LoraError, match="no base: name it with --base"):
        served_adapters.BaseChoice().open([], "predict")


def test_names_are_told_apart(runs: pathlib.Path) -> None:
    with pytest.raises(LoraError, match=r"two adapters are called 'a'(.|\n)*--adapter NAME=PATH"):
        served_adapters.BaseChoice().open([f"{runs}/a", f"a={runs}/b"], "predict")
    with pytest.raises(LoraError, match=r"cannot be called 'base'"):
        served_adapters.BaseChoice().open([f"base={runs}/a"], "predict")


def test_another_base_is_refused(
    runs: pathlib.Path, weights: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = tmp_path / "model"
    shutil.copytree(weights, other)
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    safetensors.numpy.save_file({**tensors, name: tensors[name] * 1.1}, other / "model.safetensors")
    said = (
        rf"adapter 'b', trained on {weights}, is not for the base {other}:(.|\n)*"
        r"layer_1/attention/query/kernel: other values(.|\n)*--allow-other-base"
    )
    with pytest.raises(LoraError, match=said):
        served_adapters.BaseChoice(base=str(other)).open([f"{runs}/b"], "predict")
    served = served_adapters.BaseChoice(base=str(other), allow_other_base=True).open(
        [f"{runs}/b"], "predict"
    )
    assert served.names == ("b",)


def test_a_base_of_another_shape_does_not_fit(runs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    wide = tiny.write_model(tmp_path / "wide", {**tiny.ROBERTA, "hidden_size": 32})
    with pytest.raises(LoraError, match=r"'b'(.|\n)*has shape \(32, 32\)"):
        served_adapters.BaseChoice(base=str(wide), allow_other_base=True).open(
            [f"{runs}/b"], "predict"
        )


def test_adapters_of_two_models_are_not_mixed(
    runs: pathlib.Path, params: Any, weights: pathlib.Path
) -> None:
    decoder = tiny.write_model(runs / "llama", tiny.LLAMA)
    given = save(runs / "d", params, str(decoder))
    with pytest.raises(LoraError, match=r"model.reference is '.*' for 'a' and '.*llama' for 'd'"):
        served_adapters.BaseChoice().open([f"{runs}/a", given], "predict")
    with pytest.raises(LoraError, match=r"base .*llama is a decoder; .*lora-jax generate"):
        served_adapters.BaseChoice().open([given], "predict")
    with pytest.raises(LoraError, match=r"base .*roberta is an encoder; .*lora-jax predict"):
        served_adapters.BaseChoice().open([f"{runs}/a"], "generate")
    scanned = save(runs / "e", params, str(weights), scan_layers=True)
    with pytest.raises(LoraError, match=r"model.scan_layers is False for 'a' and True for 'e'"):
        served_adapters.BaseChoice().open([f"{runs}/a", scanned], "predict")


def test_one_that_says_nothing_needs_the_base_said(
    tmp_path: pathlib.Path, params: Any, weights: pathlib.Path
) -> None:
    path = tmp_path / "mine"
    lora_jax.save(path, random_adapter(params, 2), fingerprint=lora_jax.fingerprint(params))
    with pytest.raises(LoraError, match=r"no base: (.|\n)*do not say(.|\n)*mine: .*mine"):
        served_adapters.BaseChoice().open([str(path)], "predict")
    assert served_adapters.BaseChoice(base=str(weights)).open([str(path)], "predict").names == (
        "mine",
    )


@pytest.mark.parametrize("model", [{"dtype": "object"}, {"scan_layers": 1}, {"reference": []}])
def test_what_a_stranger_says_of_the_model(model: Any, tmp_path: pathlib.Path, params: Any) -> None:
    given = save(tmp_path / "a", params, **{"reference": "x", **model})
    with pytest.raises(LoraError, match=f"a says model.{next(iter(model))} is"):
        served_adapters.BaseChoice().open([given], "predict")


@pytest.mark.parametrize("about", [{"model": []}, {"model": "x"}, {"begun": [], "model": {}}])
def test_what_a_stranger_says_is_of_another_type(
    about: Any, tmp_path: pathlib.Path, params: Any, weights: pathlib.Path
) -> None:
    lora_jax.save(tmp_path / "a", random_adapter(params, 2), about=about)
    with pytest.raises(LoraError, match=r"a says (that its model is|begun is)"):
        served_adapters.BaseChoice(base=str(weights)).open([str(tmp_path / "a")], "predict")


# ---- swapping


def test_the_checkpoint_tells_what_was_said(runs: pathlib.Path) -> None:
    member = SavedAdapter.open_lora(runs / "a/adapters/best", "a")
    assert member.about == adapter.restore_about(member.folder)


STRANGERS = ("hub:someone/model", "pypi:evil==1.0/model", f"{models.MINILM}#sha256={'0' * 64}")


@pytest.mark.parametrize("reference", STRANGERS)
def test_a_base_is_not_fetched_on_the_word_of_an_adapter(
    reference: str, tmp_path: pathlib.Path, params: Any, monkeypatch: Any
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(models, "open", lambda reference: opened.append(reference) or 1 / 0)
    given = save(tmp_path / "a", params, reference)
    with pytest.raises(LoraError) as caught:
        served_adapters.BaseChoice().open([given], "predict")
    assert not opened and f"a: {given}" in str(caught.value)
    assert f"  --base {shlex.quote(reference)}\n  --trust-base" in str(caught.value)
    for options in ({"base": reference}, {"trust_base": True}):
        with pytest.raises(ZeroDivisionError):
            served_adapters.BaseChoice(**options).open([given], "predict")
    assert opened == [reference] * 2


def test_a_known_base_is_fetched(tmp_path: pathlib.Path, params: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(models, "open", lambda reference: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        served_adapters.BaseChoice().open([save(tmp_path / "a", params, models.MINILM)], "predict")


def test_a_reference_is_one_line_of_text(tmp_path: pathlib.Path, params: Any) -> None:
    with pytest.raises(LoraError, match=r"says model\.reference is 'hub:a/b.x1b\["):
        served_adapters.BaseChoice().open(
            [save(tmp_path / "a", params, "hub:a/b\x1b[2J")], "predict"
        )


@pytest.mark.parametrize("command", ["predict", "generate", "report"])
def test_commands_ask_for_trust(
    command: str, tmp_path: pathlib.Path, params: Any, monkeypatch: Any, capsys: Any
) -> None:
    given = save(tmp_path / "run/adapters/best", params, "hub:someone/model")
    monkeypatch.setattr(models, "open", lambda reference: _missing(reference))
    for trust in ([], ["--trust-base"]):
        if command == "report":
            blocks = update_analysis._amplified(
                tmp_path / "run", BaseChoice(trust_base=bool(trust))
            )
            said = blocks[0].text
        else:
            main, more = (
                (predict.main, "--text") if command == "predict" else (generate.main, "--prompt")
            )
            assert main(["--adapter", given, more, "x", *trust]) == 1
            said = capsys.readouterr().err
        assert ("was fetched" in said) == bool(trust)
        assert ("--base hub:someone/model" in said) == (not trust)


def _missing(reference: str) -> Any:
    raise OSError(f"{reference} was fetched")
