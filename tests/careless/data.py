"""Data as people have it, and what a stranger may write into it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tests.careless.case import Case

TRAIN = (
    "train --model.reference {world}/model --data.source train={here}/train.jsonl,"
    "validation={here}/train.jsonl --data.batch-size 8 --data.eval-batch-size 8 --steps 1 "
    "--data.max-length 16 --data.buckets 16 --lora.targets **/query/kernel --run-dir {here}/run"
)
BIDI, ESCAPE = "\u202e", "\x1b[2J"


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def labelled(name: str, labels: Sequence[Any], *says: str, status: int = 1, **more: Any) -> Case:
    rows = [{"text": f"word{i}", "label": label} for i, label in enumerate(labels)]
    return Case(f"label_{name}", TRAIN, says, {"train.jsonl": lines(rows)}, status, **more)


def texts(name: str, given: Sequence[Any], *says: str, status: int = 1) -> Case:
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(given)]
    return Case(f"text_{name}", TRAIN, says, {"train.jsonl": lines(rows)}, status)


DATA = [
    labelled("empty", ["a", "", "b"] * 4, "train.jsonl:2", "label ''", "data.label_names"),
    labelled("blank", ["a", "b", " "] * 4, "train.jsonl:3", "label ' '"),
    labelled("spaces", ["pos", "pos ", "neg"] * 4, "'pos' and 'pos '", "white space"),
    labelled("case", ["Pos", "pos", "neg"] * 4, "'Pos' and 'pos'"),
    labelled("one", ["a"] * 8, "every label is 'a'"),
    labelled("null", ["a", None] * 4, "train.jsonl:2", "None"),
    labelled("mixed", ["a", 1] * 4, "more than one kind"),
    labelled("bidi", [f"a{BIDI}b", 3] * 4, "more than one kind"),
    texts("all_empty", ["", " "] * 6, "all 12 texts", "empty", "data.text_fields"),
    texts("some_empty_and_nul", ["word1", "", "wo\x00rd2", " \n"] * 4, "8 of 16 texts are empty",
          "4 of 16 texts hold NUL", status=0),
    texts("list", ["word1", ["word2"]] * 4, "train.jsonl:2", "expected a text"),
    texts("bidi_where", ["word1", [f"a{BIDI}{ESCAPE}"]] * 4, "train.jsonl:2"),
    Case("field_of_a_stranger", TRAIN, ("'text'", "label"),
         {"train.jsonl": lines([{f"x{ESCAPE}": 1, f"y{BIDI}": 2, "label": 1}])}),
    Case("file_empty", TRAIN, ("train.jsonl", "no examples"), {"train.jsonl": ""}),
    Case("file_utf16", TRAIN, ("train.jsonl:1", "UTF-8"),
         {"train.jsonl": lines([{"text": "a", "label": 1}]).encode("utf-16")}),
    Case("file_array", TRAIN, ("train.jsonl:1", "expected an object"), {"train.jsonl": "[1]\n"}),
    Case("csv_header", f"{TRAIN} --data.source {{here}}/a.csv", ("no examples",),
         {"a.csv": "text,label\n", "train.jsonl": ""}),
    Case("csv_bidi", f"{TRAIN} --data.source {{here}}/a.csv", ("'label'",),
         {"a.csv": f"te{BIDI}xt,label{ESCAPE}\na,b\nc,d\n", "train.jsonl": ""}),
    Case("name_bidi", f"train --data.source {{here}}/a{BIDI}b.jsonl", ("\\u202e",)),
    Case("source_name", "train --data.source reveiws", ("reveiws", "nearest", "reviews")),
    Case("split_name", f"{TRAIN} --data.eval-split validaton", ("validaton", "nearest: validation"),
         {"train.jsonl": lines([{"text": "a", "label": i % 2} for i in range(8)])}),
]  # fmt: skip

GOOD = [{"text": "word1"}, {"text": "word2"}, {"text": "word3"}]
BROKEN = lines(GOOD) + '{"text": "word4"\n' + lines(GOOD) + lines([{"txt": f"a{BIDI}"}, *GOOD])
PREDICT = "predict --adapter {world}/run --file {here}/in.jsonl --out {here}/out.jsonl"
ROWS = {"in.jsonl": BROKEN}
LINES = [
    Case("line_broken_at_once", PREDICT,
         ("in.jsonl, line 4 is not JSON", "Nothing is written", "--skip-broken"), ROWS),
    Case("line_broken_later", f"{PREDICT} --window 2 --batch-size 2",
         ("line 4 is not JSON", "2 rows, up to", "line 2, are written", "--skip-broken"), ROWS,
         out={"out.jsonl": "word2"}),
    Case("field_broken_later", f"{PREDICT} --window 2 --batch-size 2",
         ("line 3 has no field 'text'", "2 rows, up to", "line 2, are written", "--skip-broken"),
         {"in.jsonl": lines([*GOOD[:2], {"txt": "a"}, *GOOD])}, out={"out.jsonl": "word2"}),
    Case("line_skipped", f"{PREDICT} --skip-broken",
         ("line 4 is not JSON", "line 8 has no field 'text'", "2 of 11 lines"), ROWS, status=0,
         out={"out.jsonl": '"error"'}),
    Case("every_line_broken", f"{PREDICT} --skip-broken",
         ("2 of 2 lines are broken", "no line that can be classified"),
         {"in.jsonl": '{"a"\n{"b": 1}\n'}),
    Case("line_adapter", f"{PREDICT} --skip-broken", ("1 of 2 lines", "no adapter is called"),
         {"in.jsonl": lines([{"text": "a", "adapter": "rum"}, *GOOD[:1]])}, status=0,
         out={"out.jsonl": "no adapter is called"}),
    Case("generate_line", "generate --base {world}/lm --file {here}/in.jsonl --out {here}/o.jsonl",
         ("line 2 is not JSON",), {"in.jsonl": '{"prompt": "word1"}\n{"prompt"\n'}),
    Case("generate_long", "generate --base {world}/lm --prompt", ("tokens", "shorten"),
         extra=("word1 " * 100,)),
    Case("generate_empty", "generate --base {world}/lm --prompt", ("empty",), extra=("",)),
    Case("predict_nothing", PREDICT, ("in.jsonl has no line",), {"in.jsonl": ""}),
    Case("adapter_name", "predict --text a --adapter", ("\\u202e", "no adapter"),
         extra=(f"x{BIDI}y",)),
    Case("peft_key", "import {here} --base {world}/model --out {here}/o", ("\\u202e",),
         {"adapter_config.json": lines([{"peft_type": "LORA", f"a{BIDI}": 1, "r": 1}]),
          "adapter_model.safetensors": b"\x02" + bytes(7) + b"{}"}),
]  # fmt: skip
