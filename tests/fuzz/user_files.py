"""Files that users write or edit by hand: data in JSONL and CSV, run directories, command lines."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import pathlib
from random import Random
from typing import Any

from lora_jax import data
from lora_jax.cli import train as command_line
from lora_jax.cli.export import ExportOptions
from lora_jax.cli.generate import GenerateOptions
from lora_jax.cli.import_ import ImportOptions
from lora_jax.cli.predict import PredictOptions
from lora_jax.cli.report import ReportOptions
from lora_jax.report import many_runs, run_files, single_run
from lora_jax.serving import jsonl, prompts
from lora_jax.serving.served_adapters import BaseChoice
from lora_jax.system import console
from lora_jax.training import config_json
from tests.formats import RUN, small
from tests.fuzz import mutate
from tests.fuzz.kind import TESTS, Files, stored
from tests.fuzz.model_files import tokenizer_files

# ---- data ------------------------------------------------------------------------------------

_ROWS = [
    {"text": "a b c", "label": 0, "other": None},
    {"text": "ab", "label": 1, "other": [1]},
    {"text": "c d" * 9, "label": 1, "other": {"a": 2.5}},
    {"text": "h", "label": 0, "other": "x"},
]
_CSV = b'text,label,score\n"a, b",no,1.5\nab,yes,2\n"c ""d""",yes,-1e3\nh,no,0\n'


def make_data(random: Random) -> Files:
    if random.random() < 0.3:
        return {"a.csv": _csv(random)}
    lines = [json.dumps(row).encode() for row in _ROWS * random.choice((1, 1, 3))]
    for _ in range(random.randint(1, 2)):
        changed = mutate.json_text(random, json.dumps(random.choice(_ROWS)))
        lines[random.randrange(len(lines))] = changed
    made = b"\n".join(lines)
    return {"a.jsonl": mutate.bytes_of(random, made) if random.random() < 0.1 else made}


def _csv(random: Random) -> bytes:
    rows = [line.split(b",") for line in _CSV.splitlines()]
    for _ in range(random.randint(1, 3)):
        row = random.choice(rows)
        value = str(mutate.some_value(random)).encode("utf-8", "surrogatepass")[:2_000_000]
        match random.randrange(5):
            case 0:
                row.append(value)
            case 1:
                row[:1] = []
            case 2:
                rows.append(list(row))
            case _:
                at = random.randrange(len(row) + 1)
                row[at : at + 1] = [value]
    made = b"\n".join(b",".join(row) for row in rows)
    return mutate.bytes_of(random, made) if random.random() < 0.4 else made


@functools.cache
def tokenizer() -> Any:
    """Return the tokenizer that encodes the data."""
    import tokenizers

    return tokenizers.Tokenizer.from_str(tokenizer_files()[1].decode())


def read_data(random: Random, folder: pathlib.Path) -> None:
    """Read the data as training does, or as predict and generate do."""
    (file,) = folder.iterdir()
    name, path = file.name, str(file)
    config = data.DataConfig(
        path,
        text_fields=random.choice((("text",), ("text", "label"))),
        label_field=random.choice(("label", "label", "score", "text", "other")),
        regression=random.random() < 0.2,
        prompt=random.choice(("{text}", "{text} {label}", "a {other}")),
        answer=random.choice(("", "{label}")),
        eos="",
        buckets=(4,),
        max_length=8,
    )
    match random.randrange(4):
        case 0 if name == "a.jsonl":
            for line in prompts.read(path):
                assert isinstance(line if isinstance(line, str) else line.get("text", str, ""), str)
        case 0 | 1:
            for row in data.language_modelling(config, tokenizer(), "train", 2):
                assert row["input_ids"].shape == row["targets"].shape == (2, 8)
        case 2 if name == "a.jsonl":
            assert all(line.size for line in jsonl.read(path))
        case _:
            batches = data.classification(config, tokenizer(), "train", 2)
            assert batches.facts().examples == sum(int(b["weight"].sum()) for b in batches)


# ---- run directories -------------------------------------------------------------------------

_NAMES = ("config.json", "metrics.jsonl", "summary.json")


def make_run(random: Random) -> Files:
    files = {name: stored(RUN)[name] for name in _NAMES}
    name = random.choice(_NAMES)
    lines = files[name].splitlines() if name == "metrics.jsonl" else [files[name]]
    at = random.randrange(len(lines))
    lines[at] = mutate.json_text(random, lines[at])
    return files | {name: b"\n".join(lines) + b"\n"}


@functools.cache
def good_run() -> run_files.SavedRun:
    return run_files.read(RUN)[0]


def read_run(random: Random, folder: pathlib.Path) -> None:
    """Read a run as a report does, and as training does that continues it."""
    (run,) = run_files.read(folder)
    assert isinstance(run.steps, int) and isinstance(run.step, int)
    for scores in (run.before, run.after):
        for numbers in scores.values():
            assert all(x is None or isinstance(x, int | float) for x in numbers.values())
    assert isinstance(config_json.changes(run.config, small.config), list)
    if random.random() < 0.5:
        made = single_run.report(run, BaseChoice())
    else:
        made = many_runs.report("two", [run, good_run()], BaseChoice())
    assert made.sections


# ---- command lines ---------------------------------------------------------------------------

CONFIG = str(TESTS / "formats" / "small.py")
_COMMANDS: tuple[tuple[Any, str], ...] = (
    (PredictOptions, "--adapter --text --batch-size --window --base --out --file"),
    (GenerateOptions, "--adapter --prompt --stop --temperature --seed --top-p"),
    (ReportOptions, "run --out --base --trust-base"),
    (ExportOptions, "run --out --format --dtype --profile"),
    (ImportOptions, "folder --out --labels --lengths --pooling --scan-layers"),
)
_TRAIN = """--config --steps --seed --lora.rank --lora.alpha --lora.targets --run-dir --width
    --fresh -- --optimizer.learning-rate --from --select --mesh.data --lora.no-such --lora.kind
    --lora.dropout --plan.plan --lora.rank.x"""
_VALUES = ("1", "0", "-1", "2.5", "nan", "1e400", "None", "True", "q@rank=2,alpha=nan", "[")
_VALUES += ("a b", "")


def make_line(random: Random) -> Files:
    """Draw a command line, as the number of its command and its words."""
    number = random.randrange(-3, len(_COMMANDS))
    options = (_TRAIN if number < 0 else _COMMANDS[number][1]).split()
    words = []
    for _ in range(random.randint(1, 4)):
        name = random.choice(options)
        changed = str(mutate.near(random, name)) if random.random() < 0.15 else name
        value = random.choice((*_VALUES, *map(str, mutate.NUMBERS), *mutate.TEXTS))
        words += random.choice(([changed, value], [f"{changed}={value}"], [changed], [value]))
    return {"line.json": json.dumps([number, words]).encode()}


def read_line(random: Random, folder: pathlib.Path) -> None:
    """Parse a line as its command does; tyro ends with exit status 2 for a wrong one."""
    number, words = json.loads((folder / "line.json").read_bytes())
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        if number >= 0:
            console.read_options(_COMMANDS[number][0], "lora-jax", "", words)
            return
        name, config, _ = command_line.parse(["--config", CONFIG, *words], CONFIG, TESTS)
        json.dumps(config_json.to_dict(config))
        assert config_json.short_hash(config_json.identity(config)) and name
