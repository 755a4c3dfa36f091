"""Open every folder in a folder, for `benchmarks.peft.merged`. This file does not use JAX."""

import json
import pathlib
import sys
import warnings

import numpy as np
import peft
import torch
import transformers as hf

TOLERANCE = 1e-5
DEEP = {"smollm2_gguf.hf": 5e-5}  # 30 layers; without an adapter they differ by 1.6e-5 already
KINDS = {
    "ForSequenceClassification": hf.AutoModelForSequenceClassification,
    "ForImageClassification": hf.AutoModelForImageClassification,
}
LABELS = ["no", "maybe", "yes"]


def opened(folder):
    """Return the model, and a list of problems."""
    if (folder / "adapter_config.json").exists():
        settings = json.loads((folder / "adapter_config.json").read_text())
        base = settings["base_model_name_or_path"]
        kind = hf.AutoModelForCausalLM
        if settings["task_type"] == "SEQ_CLS":
            is_vit = (
                json.loads(pathlib.Path(base, "config.json").read_text())["model_type"] == "vit"
            )
            kind = KINDS["ForImageClassification" if is_vit else "ForSequenceClassification"]
        count = 1 if folder.name.startswith("bert_number") else 3
        head = {"num_labels": count, "ignore_mismatched_sizes": True}
        more = {} if kind is hf.AutoModelForCausalLM else head
        model = peft.PeftModel.from_pretrained(kind.from_pretrained(base, **more), folder)
        return model.eval(), []
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    kind = next((k for end, k in KINDS.items() if name.endswith(end)), hf.AutoModelForCausalLM)
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    said = [f"{key}: {sorted(value)[:3]}" for key, value in info.items() if value]
    if type(model).__name__ != name:
        said.append(f"opened as {type(model).__name__}, not {name}")
    labels = [model.config.id2label.get(i) for i in range(3)]
    if model.config.num_labels == 3 and kind in KINDS.values() and labels != LABELS:
        said.append(f"labels {labels}")
    return model.eval(), said


def difference(folder):
    golden = np.load(folder / "expected.npz")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model, said = opened(folder)
        model.config._experts_implementation = "eager"  # the fused one needs larger experts
        if golden["inputs"].ndim == 4:
            pixels = torch.tensor(golden["inputs"].transpose(0, 3, 1, 2))
            out = model(pixel_values=pixels).logits
        else:
            out = model(input_ids=torch.tensor(golden["inputs"].astype(np.int64))).logits
    if "text" in golden:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        if tokenizer(str(golden["text"])).input_ids != list(golden["ids"]):
            said.append("other tokens")
        chat = [{"role": "user", "content": "Hello"}]
        if "Hello" not in tokenizer.apply_chat_template(chat, tokenize=False):
            said.append("no chat template")
    far = np.abs(out.numpy() - golden["out"]).max()
    return far / max(1.0, np.abs(golden["out"]).max()), said


def main():
    print(f"torch {torch.__version__}, transformers {hf.__version__}, peft {peft.__version__}")
    bad = 0
    for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
        worst, said = difference(folder)
        bad += bool(worst > DEEP.get(folder.name, TOLERANCE) or said)
        print(f"{folder.name:28} {worst:.1e}", *said)
    if bad:
        raise SystemExit(f"{bad} of them differ by more than {TOLERANCE}, or were not opened whole")


if __name__ == "__main__":
    main()
