"""Compare the logits of merged folders of lora_jax, opened by transformers, with our own.

    python -m benchmarks.peft.merged [--python PATH]

It writes a run for every model of tests/golden/golden_models and for SmolLM2's GGUF file, and
exports each with `lora-jax export --format hf` and with `--format peft`. Then it opens the folders
with transformers and PEFT, without extra flags, in the environment of `benchmarks.peft.compare`,
which is made if it does not exist (`--python` names another interpreter with torch, transformers
and peft). It prints the largest difference of the logits relative to the largest logit. It fails if
one is above 1e-5, if tensors are missing or unused, or if labels or tokens differ.
"""

import argparse
import pathlib
import subprocess
import tempfile
from typing import Any

import numpy as np

from benchmarks.peft.compare import environment
from lora_jax import LoraSpec, models
from lora_jax.cli import export
from measuring.golden_runs import GOLDEN, write_run

HERE = pathlib.Path(__file__).resolve().parent
# PEFT can express these specs; the merged folder can express any.
SPECS: dict[str, LoraSpec] = {
    "vit": LoraSpec(2, 3.0, "vit/encoder/**/kernel"),
    "vit_oblong": LoraSpec(2, 3.0, "vit/encoder/**/kernel"),
    "deberta_v2": LoraSpec(2, 3.0, "bert/encoder/layer_*/**/kernel"),
    "deberta_v3": LoraSpec(2, 3.0, "bert/encoder/layer_*/**/kernel"),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_scanned": ("llama", {"scan": True}),
    "llama_qlora": ("llama", {"quantize": "nf4"}),
    "llama_pissa": ("llama", {"begin": "pissa"}),
    "bert_number": ("bert", {"labels": ()}),
    "smollm2_gguf": (
        models.SMOLLM2,
        {"quantize": "stored", "spec": LoraSpec(2, 0.1, "**/q/kernel")},
    ),
}
TEXT = "An adapter, merged: naïve façade, 1984!\n<|im_start|>user"
STORED = ("llama_int8", "llama_nf4", "llama_nf4_double")


def exported(scratch: pathlib.Path, name: str, model: str, options: dict[str, Any]) -> None:
    """Write the folders `name.hf` and `name.peft`, with the outputs of the run in both."""
    run = write_run(scratch / "runs" / name, model, **options)
    for kind in ("hf", "peft"):
        if kind == "peft" and "quantize" in options:
            continue  # PEFT would open another base
        out = scratch / "out" / f"{name}.{kind}"
        status = export.main([str(run.folder), "--format", kind, "--out", str(out)])
        assert status == 0, (name, kind)
        more = {}
        if name == "smollm2_gguf":
            more = {"text": TEXT, "ids": models.open(model).tokenizer().encode(TEXT).ids}
        np.savez(out / "expected.npz", inputs=run.inputs, out=run.outputs, **more)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exports of lora_jax, opened by transformers.")
    parser.add_argument("--python", help="an interpreter with torch, transformers and peft")
    args = parser.parse_args()
    python = args.python or str(environment())
    cases = {name: (name, {"quantize": "stored"}) for name in STORED} | MORE
    for folder in sorted(GOLDEN.iterdir()):
        own = {"spec": SPECS[folder.name]} if folder.name in SPECS else {}
        cases.setdefault(folder.name, (folder.name, own))
    with tempfile.TemporaryDirectory() as scratch:
        for name, (model, options) in cases.items():
            exported(pathlib.Path(scratch), name, model, options)
        subprocess.run([python, str(HERE / "merged_opened.py"), f"{scratch}/out"], check=True)


if __name__ == "__main__":
    main()
