"""Texts that are written during a run, in its record and its report."""

import dataclasses
import html
import json
import pathlib

import jax
import pytest

from lora_jax.cli import report
from lora_jax.data.config import DataConfig
from lora_jax.models import DecoderConfig
from lora_jax.sweeps.config import GroupConfig, Member
from lora_jax.training.causal_lm import causal_lm, words_of
from lora_jax.training.config import ConfigError, LoraConfig, OptimizerConfig
from lora_jax.training.config_json import to_dict
from lora_jax.training.pretrained import open_model
from lora_jax.training.samples import questions, rouge_l
from lora_jax.training.text import ModelConfig, SamplesConfig, TextConfig
from tests.training import runs, tiny

HOSTILE = "say <script>alert(1)</script> & | *word1*"


@pytest.mark.parametrize(
    ("text", "expected", "value"),
    [
        ("The cat sat.", "the black cat sat down", 0.75),
        ("a b c d e f", "f e d c b a", 0.166667),
        ("", "word", 0),
        ("snake_case x-ray 12.5", "snake case x ray 12 5 more", 0.923077),
        ("to be or not to be that is", "that is the question to be or not", 0.5),
    ],
)
def test_rouge_l_is_that_of_rouge_score(text: str, expected: str, value: float) -> None:
    """The values are from rouge-score 0.1.2, which drops every letter beyond ASCII."""
    assert rouge_l(text, expected) == pytest.approx(value, abs=1e-6)


def test_rouge_l_reads_every_alphabet() -> None:
    assert rouge_l("Größe über alles", "größe über alle") == pytest.approx(2 / 3)


def length(text: str, expected: str) -> float:
    return float(len(text))


def config_of(folder: pathlib.Path) -> TextConfig:
    found = tiny.write_chat(folder)
    rows = pathlib.Path(found["chats"]).read_text().splitlines()
    asked = {"role": "user", "content": HOSTILE}
    evil = {"messages": [asked, {"role": "assistant", "content": "word1"}]}
    (folder / "validation.jsonl").write_text("\n".join([json.dumps(evil), *rows[:8]]))
    (folder / "train.jsonl").write_text("\n".join(rows))
    return TextConfig(
        workload=causal_lm,
        model=ModelConfig(reference=found["base"]),
        data=DataConfig(
            str(folder / "{split}.jsonl"), max_length=96, batch_size=8, eval_batch_size=8
        ),
        lora=LoraConfig(rank=4, targets=("layers*/attention/*/kernel",)),
        optimizer=OptimizerConfig(learning_rate=5e-2),
        samples=SamplesConfig(prompts=3, new_tokens=8, score=length),
        select="rouge_l",
        steps=20,
        evaluate_every=10,
    )


@pytest.mark.slow
def test_a_run_records_and_reports_what_it_answers(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path)
    summary = runs.train_in(tmp_path / "run", config)
    names = {"exact_match", "rouge_l", "length"}
    assert names < set(summary["before"]["validation"])
    assert names < set(summary["after"]["validation"])
    assert summary["select"] == "rouge_l"
    first = summary["samples"][0]
    assert len(summary["samples"]) == 3
    assert (first["asked"], first["expected"]) == (HOSTILE, "word1")
    assert any(sample["before"] != sample["after"] for sample in summary["samples"])
    assert "<|im" not in json.dumps(summary["samples"])
    (tmp_path / "run/config.json").write_text(json.dumps(to_dict(config)))
    assert report.main([str(tmp_path / "run")]) == 0
    page = (tmp_path / "run/report/report.html").read_text()
    assert "<script>alert" not in page and html.escape(HOSTILE) in page
    assert html.escape(summary["samples"][1]["before"]) in page


def test_the_text_is_what_generation_would_write(tmp_path: pathlib.Path) -> None:
    """The question ends where the template asks for an answer, and its end is the turn's."""
    config = config_of(tmp_path)
    words = words_of(open_model(config.model.reference, DecoderConfig, ""))()
    tokenizer = words.tokenizer
    found = list(questions(config.data, words))
    assert found[0].expected == "word1"
    text = tokenizer.decode(found[1].prompt.tokens, skip_special_tokens=False)
    assert text.endswith(f"<|im_start|>user\n{found[1].asked}<|im_end|>\n<|im_start|>assistant\n")
    assert {tokenizer.id_to_token(i) for i in found[1].prompt.stop} == {"<|im_end|>", "</s>"}


def test_texts_without_a_question_have_no_samples(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text('{"text": "word1 word2"}\n' * 8)
    config = dataclasses.replace(config, select=None)
    with pytest.raises(ConfigError, match=r"samples\.prompts.*no validation example"):
        runs.train_in(tmp_path / "run", config)


def test_members_of_a_group_write_no_samples(tmp_path: pathlib.Path) -> None:
    group = GroupConfig(members=(Member("a", config_of(tmp_path)),))
    with pytest.raises(ConfigError, match=r"--samples\.prompts is for one run, and 'a' is a"):
        runs.train_group(tmp_path / "group", group)


def test_one_process_writes_samples(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"samples\.prompts must be 0 with several processes"):
        causal_lm(config)
