"""Open every adapter in a folder with PEFT, for `benchmarks.peft.adapters`, without JAX."""

import json
import pathlib
import re
import sys
import warnings

import numpy as np
import peft
import torch
import transformers as hf

TOLERANCE = 1e-5
GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests" / "golden"
# PEFT 0.21 with transformers 5.24 also prints these warnings for its own adapters.
OWN = re.compile(
    r"`is_gradient_checkpointing` is deprecated.*"
    r"|The following (rank|alpha)_pattern keys did not match .*: \['\.\*\\{1,2}\.gate_up_proj'\].*"
)


def base(settings):
    if settings["task_type"] == "SEQ_CLS":
        kind = hf.BertForSequenceClassification
        return kind.from_pretrained(settings["base_model_name_or_path"], num_labels=3)
    if settings["base_model_name_or_path"] == "toy":
        sys.path.insert(0, str(GOLDEN))
        import make_peft

        return make_peft.base("toy")
    if settings["base_model_name_or_path"]:
        return hf.AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=12,
        moe_intermediate_size=12,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return hf.Qwen3MoeForCausalLM(config)


def difference(folder):
    """Return the largest difference relative to the largest logit above 1, and PEFT's warnings."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    golden = np.load(folder / "expected.npz")
    model = base(settings)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        opened = peft.PeftModel.from_pretrained(model, folder).eval()
        said = [str(w.message).splitlines()[0][:200] for w in caught]
        said = [text for text in said if not OWN.match(text)]
        if "out" in golden:
            out = opened(input_ids=torch.tensor(np.asarray(golden["input_ids"], np.int64)))
            far = np.abs(out.logits.numpy() - golden["out"]).max()
            return far / max(1.0, np.abs(golden["out"]).max()), said
        merged = dict(opened.merge_and_unload().named_parameters())
        moved = {name: (merged[name] - before[name]).numpy() for name in golden}
        return max(np.abs(moved[name] - golden[name]).max() for name in golden), said


def main():
    print(f"torch {torch.__version__}, transformers {hf.__version__}, peft {peft.__version__}")
    bad = 0
    for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
        worst, said = difference(folder)
        bad += bool(worst > TOLERANCE or said)
        print(f"{folder.name:20} {worst:.1e}", *said)
    if bad:
        raise SystemExit(f"{bad} of them differ by more than {TOLERANCE}, or PEFT warned")


if __name__ == "__main__":
    main()
