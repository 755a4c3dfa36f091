"""Faults that the fuzzer has found, as small as possible; each was a traceback or worse."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import tensorstore
import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

import lora_jax
from lora_jax import LoraError, data
from lora_jax.checkpoint import adapter as checkpoints
from lora_jax.checkpoint.saved_adapter import SavedAdapter
from lora_jax.errors import ModelConfigError, TokenizerError, WeightsError, nearest
from lora_jax.exchange import peft
from lora_jax.layout import Layout
from lora_jax.models.text import example, tokens
from lora_jax.models.weights import preprocessing
from lora_jax.models.weights.folder import Folder
from lora_jax.report import many_runs, run_files
from lora_jax.serving import jsonl
from lora_jax.serving.served_adapters import BaseChoice
from lora_jax.system import console
from lora_jax.training import config_json
from tests.formats import small
from tests.fuzz import adapters
from tests.fuzz.kind import write
from tests.fuzz.model_files import FOLDERS, IMAGES
from tests.fuzz.user_files import RUN

pytestmark = pytest.mark.standard_promotion


EMPTY = json.loads(Layout().to_json())


def layout(**changes: Any) -> str:
    """A layout of one target, with other values."""
    found = json.loads(adapters.layouts()[2])
    found["targets"][0].update(changes)
    return json.dumps(found)


LOKR = {"kind": "lokr", "parts": []}
LAYOUTS = (
    (layout(shape=[[8], 6]), r"shape is \(\(8,\), 6\)"),
    (layout(shape=[8, 2**63]), "shape is"),
    (layout(shape="86"), "shape is 86"),
    (layout(stack={"a": 1}), "stack is"),
    (layout(rank=2.0), "rank is 2.0"),
    (layout(alpha=10**301), "alpha is"),
    (layout(path=3), "path is 3"),
    (layout(parts=[[0, 2, 4]]), "parts is"),
    (layout(parts=3), "parts is 3"),
    (layout(part_axis=None), "part_axis is None"),
    (layout(fold="no"), "fold is no"),
    (layout(kind=[]), "kind is"),
    *((json.dumps(EMPTY | {"targets": x}), "in a list") for x in (3, {"a": 1}, None, "w")),
    (json.dumps(EMPTY | {"targets": json.loads(layout())["targets"] * 2}), "'qkv' twice"),
    (layout().replace('"rank": 2', '"rank": 2, "rank": 1'), "the key 'rank' is there twice"),
    # LoKr tries divisors one by one, and 0 has none.
    *((layout(shape=[size, 6], **LOKR), "LoKr splits sizes") for size in (0, 2**61 - 1)),
)


@pytest.mark.parametrize(("text", "says"), LAYOUTS)
def test_a_layout_that_no_program_wrote(text: str, says: str) -> None:
    with pytest.raises(LoraError, match=says):
        Layout.from_json(text)


@pytest.mark.parametrize("start", ["[", '{"a":', " ["])
@pytest.mark.parametrize("name", ["arrays/_sharding", "arrays/_METADATA", "_CHECKPOINT_METADATA"])
def test_a_file_of_orbax_that_is_nested_too_deeply(
    tmp_path: pathlib.Path, name: str, start: str
) -> None:
    end = b"" if start == '{"a":' else b"]" * 100_000
    write(tmp_path, {**adapters.checkpoints_files()[1], name: start.encode() * 100_000 + end})
    with pytest.raises(LoraError, match=r"nested too deeply|not JSON"):
        checkpoints.restore(tmp_path)


def test_an_array_that_is_described_too_deeply(tmp_path: pathlib.Path) -> None:
    write(tmp_path, adapters.checkpoints_files()[2])
    base = {"driver": "file", "path": f"{tmp_path}/arrays/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    assert lora_jax.restore(tmp_path)
    store.write("adapters.q.a/zarr.json", b"[" * 30_000 + b"]" * 30_000).result()
    with pytest.raises(LoraError, match=r"adapters\.q\.a/zarr\.json is nested too deeply"):
        lora_jax.restore(tmp_path)


def test_a_manifest_that_was_edited(tmp_path: pathlib.Path) -> None:
    files = adapters.checkpoints_files()[2]
    stored = json.loads(files[adapters.MANIFEST])
    text = json.dumps(stored | {"sha256": ["x" * 100_000]}).encode()
    write(tmp_path / "seal", {**files, adapters.MANIFEST: text})
    with pytest.raises(LoraError, match="meta is not what was saved") as failure:
        checkpoints.restore_layout(tmp_path / "seal")
    assert len(str(failure.value)) < 1_000
    manifest = json.loads(stored["text"])
    del manifest["notes"]["fingerprint"]
    write(tmp_path / "a", {**files, adapters.MANIFEST: adapters.sealed(json.dumps(manifest))})
    with pytest.raises(LoraError, match="no fingerprint"):
        SavedAdapter.open(tmp_path / "a").check_base({})


@pytest.mark.parametrize(
    "text", [b'{"do_resize": ', b"[]", b'{"a": "\x80"}', b'{"size": 8, "size": 8}', b"[" * 10_000]
)
def test_preprocessing_that_is_not_json(tmp_path: pathlib.Path, text: bytes) -> None:
    (tmp_path / preprocessing.FILE).write_bytes(text)
    with pytest.raises(ModelConfigError, match=preprocessing.FILE):
        preprocessing.read(tmp_path, Folder(FOLDERS / "vit").config)  # type: ignore[arg-type]


def test_preprocessing_of_a_model_is_read(tmp_path: pathlib.Path) -> None:
    config: Any = Folder(FOLDERS / "vit").config
    size = dict(zip(("height", "width"), config.image_size, strict=True))
    (tmp_path / preprocessing.FILE).write_text(json.dumps(IMAGES | {"size": size}))
    assert preprocessing.read(tmp_path, config).size == config.image_size


def test_a_file_whose_name_no_system_has(tmp_path: pathlib.Path) -> None:
    shutil.copytree(FOLDERS / "bert", tmp_path, dirs_exist_ok=True)
    index = {"weight_map": {"w": "x" * 300 + ".safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="w is in 'xxx"):
        Folder(tmp_path).stored()


PATTERNS = [{"rank_pattern": x} for x in (3.5, [1], {"q": "x"})]
PATTERNS += [{"alpha_pattern": {"q": 10**400}}]  # an integer above the floats


@pytest.mark.parametrize("pattern", PATTERNS)
def test_servers_are_not_asked_about_nonsense(tmp_path: pathlib.Path, pattern: Any) -> None:
    files = adapters.peft_folders()[0]
    settings = json.loads(files[peft.CONFIG]) | pattern
    write(tmp_path, {**files, peft.CONFIG: json.dumps(settings).encode()})
    with pytest.raises(LoraError, match=f"{next(iter(pattern))} is"):
        peft.check(tmp_path, "vllm")


def tokenizer(template: str = "[CLS] $A", words: str = "ab") -> tokenizers.Tokenizer:
    """A tokenizer of single characters, without padding."""
    vocabulary = {name: i for i, name in enumerate(["[CLS]", *words])}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    special = [("[CLS]", 0)]
    found.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    return found


def test_encoders_check_their_tokenizer() -> None:
    """A letter needs a token, a start token needs a row, and a text may stand there once."""
    assert tokens.Encoder(tokenizer(), 8).start == (0,)
    with pytest.raises(data.DataError, match="no token for the text 'a'"):
        _ = tokens.Encoder(tokenizer(words="xy"), 8).start
    last = tokenizer()
    last.post_processor = processors.TemplateProcessing("b $A", special_tokens=[("b", 2)])
    assert tokens.Encoder(last, 8, 3).start == (2,)
    with pytest.raises(data.DataError, match=r"token 2 \('b'\).*embeddings for 2"):
        _ = tokens.Encoder(last, 8, 2).start
    encoder, truncation = tokens.Encoder(tokenizer("[CLS] $A $A"), 6), tokens.TextTruncation()
    assert len(encoder.truncate(["ab"], truncation)[0]) == 5
    with pytest.raises(data.DataError, match="repeats the text"):
        encoder.truncate(["ababababab"], truncation)


class Contradicting:
    """A tokenizer with two tokens of the same number: saving it loses one of them, at random."""

    def to_str(self) -> str:
        """Return the text that the package writes for such a tokenizer and then cannot read."""
        return tokenizer().to_str().replace('"merges":[]', '"merges":[["a","b"]]')


def test_a_tokenizer_that_is_not_what_it_writes() -> None:
    with pytest.raises(data.DataError, match="the tokenizer contradicts itself: Token `ab`"):
        tokens.Encoder(Contradicting(), 8)  # type: ignore[arg-type]


def stored(folder: pathlib.Path, **parts: Any) -> Folder:
    """A model's folder whose tokenizer.json has these parts."""
    found = tokenizer()
    for name, part in parts.items():
        setattr(found, name, part)
    found.save(str(folder / "tokenizer.json"))
    return Folder(folder)


@pytest.mark.parametrize("name", ["normalizer", "decoder"])
def test_a_tokenizer_that_makes_gigabytes_of_a_word(tmp_path: pathlib.Path, name: str) -> None:
    room: Any = {"normalizer": normalizers, "decoder": decoders}[name]
    steps = [room.Replace("a", "a" * 9)] * 9
    with pytest.raises(TokenizerError, match=f"its {name} makes texts up to 1,000,000,000 times"):
        stored(tmp_path, **{name: room.Sequence(steps)}).tokenizer()
    assert stored(tmp_path, **{name: room.Sequence(steps[:2])}).tokenizer()


def test_a_token_with_a_huge_id(tmp_path: pathlib.Path) -> None:
    """A token id far above the number of tokens is refused."""
    vocabulary = {"a": 0, "b": 4_000_000_000}
    found = {"version": "1.0", "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(
        TokenizerError, match="a token with the id 4,000,000,000; expected ids below"
    ):
        Folder(tmp_path).tokenizer()


@pytest.mark.parametrize("template", ["$A $A", "$A " + "[CLS] " * 101, "$A:2 [CLS]"])
def test_a_template_that_no_model_has(tmp_path: pathlib.Path, template: str) -> None:
    made = processors.TemplateProcessing(template.strip(), special_tokens=[("[CLS]", 0)])
    inside = processors.Sequence([processors.ByteLevel(), made])
    for part in (made, inside):
        with pytest.raises(TokenizerError, match="its post-processor makes single texts of"):
            stored(tmp_path, post_processor=part).tokenizer()


def test_an_expression_that_takes_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expression that takes hours is an error after a limit of time."""
    slow = tokenizer()
    expression = ".{0,200}.{0,200}.{0,200}(?!.|$)"
    slow.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    monkeypatch.setattr(tokens, "SECONDS", 0.05)
    encoder = tokens.Encoder(slow, 8)
    with pytest.raises(data.DataError, match="has not come to an end with 200 characters"):
        encoder.plain(["ab" * 100])
    assert encoder.plain(["ab"]) == [[1, 2]]


def test_half_a_character_on_a_terminal() -> None:
    assert console.printable("a\ud800b\U0001f600") == "a\\ud800b\U0001f600"


def test_names_of_many_characters(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.csv").write_text(f"text,label,{'x' * 50_000}\na,b\n")
    source = data.open_source(data.DataConfig(str(tmp_path / "a.csv")).source)
    names = {"x" * 20_000: 0, **{str(i): i for i in range(20_000)}}
    line = jsonl.JsonLine(names, "a.jsonl, line 1")
    for call, says in (
        (lambda: source.examples("train"), "the header names 3"),
        (lambda: example.field_of(names, "text", "text_fields", "a.jsonl"), "has no 'text'"),
        (lambda: line.get("text", str), "has no field 'text'"),
    ):
        with pytest.raises(LoraError, match=says) as failure:
            call()
        assert len(str(failure.value)) < 3_000


def test_the_nearest_of_long_names() -> None:
    assert nearest("ab" * 50_000, ["ba" * 50_000, "ab" * 40_000], 1) == ["ab" * 40_000]


def changed(folder: pathlib.Path, name: str, change: Callable[[Any], None]) -> pathlib.Path:
    """Copy a run and edit one file of it."""
    for each in ("config.json", "metrics.jsonl", "summary.json"):
        shutil.copy(RUN / each, folder / each)
    lines = (folder / name).read_text().splitlines()
    found = json.loads(lines[0] if name == "metrics.jsonl" else "\n".join(lines))
    change(found)
    rest = lines[1:] if name == "metrics.jsonl" else []
    (folder / name).write_text("\n".join([json.dumps(found), *rest]) + "\n")
    return folder


def test_a_config_with_numbers_for_patterns(tmp_path: pathlib.Path) -> None:
    folder = changed(tmp_path, "config.json", lambda x: x["lora"].update(targets=[1, "b", None]))
    (run,) = run_files.read(folder)
    assert any("lora.targets" in line for line in config_json.changes(run.config, small.config))


@pytest.mark.parametrize(
    "value",
    [[[1], {"a": 2}], 1e308, float("nan"), float("inf"), 10**400, {}],
    ids=["list", "large", "nan", "inf", "huge", "object"],
)
def test_a_report_on_an_edited_config(tmp_path: pathlib.Path, value: Any) -> None:
    """Values that cannot be hashed, ordered or drawn are shown as text."""
    folder = changed(tmp_path, "config.json", lambda x: x["optimizer"].update(learning_rate=value))
    runs = [*run_files.read(folder), *run_files.read(RUN)]
    assert many_runs.report("two", runs, BaseChoice()).sections


NUMBERS = [("metrics.jsonl", "loss"), ("summary.json", "adapter_file_bytes")]
ODD = ["x", [1], 10**400, {"a": 1}]
COUNTS = [("adapter_parameters", math.inf), ("base_parameters", 0)]  # a base has parameters
EDITS = [(*where, value) for where in NUMBERS for value in ODD]


@pytest.mark.parametrize(
    ("name", "field", "value"), [*EDITS, *(("summary.json", *count) for count in COUNTS)]
)
def test_a_number_of_a_run_that_is_none(
    tmp_path: pathlib.Path, name: str, field: str, value: Any
) -> None:
    folder = changed(tmp_path, name, lambda x: x.update({field: value}))
    with pytest.raises(LoraError, match=rf"{name}.*{field}"):
        run_files.read(folder)
