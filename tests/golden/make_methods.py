"""Write golden_methods/: adapters of PEFT's other methods, and the logits of their models.

    pip install torch transformers peft
    python tests/golden/make_methods.py

make_peft.py makes the bases. Every element of an adapter is random, so that a lost parameter
is noticed. The folder was written with torch 2.15.0, transformers 5.24.0 and peft 0.21.2.
"""

import shutil
from pathlib import Path

import numpy as np
import peft
import torch
from make_peft import base, inputs

HERE = Path(__file__).parent / "golden_methods"
SOME = ["q_proj", "v_proj", "down_proj"]
FORWARD = {
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}

# Name -> (base, config of PEFT)
CASES = {
    "loha": ("llama", peft.LoHaConfig(r=3, alpha=5, target_modules=SOME)),
    "loha_patterns": (
        "llama",
        peft.LoHaConfig(
            r=2,
            alpha=3,
            target_modules=SOME,
            rank_pattern={"v_proj": 3},
            alpha_pattern={"q_proj": 1},
        ),
    ),
    "loha_saved": (
        "llama",
        peft.LoHaConfig(r=2, alpha=3, target_modules=SOME, modules_to_save=["lm_head"]),
    ),
    "lokr": ("llama", peft.LoKrConfig(r=1, alpha=3, target_modules=SOME)),
    "lokr_whole": ("llama", peft.LoKrConfig(r=8, alpha=12, target_modules=SOME)),
    "lokr_factor": (
        "llama",
        peft.LoKrConfig(r=1, alpha=3, target_modules=SOME, decompose_factor=8, decompose_both=True),
    ),
    "toy_loha": ("toy", peft.LoHaConfig(r=2, alpha=3, target_modules=["conv1", "conv2", "out"])),
    "toy_lokr": ("toy", peft.LoKrConfig(r=1, alpha=3, target_modules=["conv1", "conv2", "out"])),
    "vera": ("llama", peft.VeraConfig(r=5, target_modules=SOME)),
    "vera_wide": ("llama", peft.VeraConfig(r=40, target_modules=["q_proj"])),
    "ia3": ("llama", peft.IA3Config(**FORWARD)),
    "ia3_bert": (
        "bert",
        peft.IA3Config(
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
            task_type="SEQ_CLS",
        ),
    ),
    "ia3_biased": ("llama_biased", peft.IA3Config(**FORWARD)),
    "oft": ("llama", peft.OFTConfig(oft_block_size=4, target_modules=SOME)),
    "oft_cayley": (
        "llama",
        peft.OFTConfig(oft_block_size=8, target_modules=SOME, use_cayley_neumann=False),
    ),
    "oft_shared": (
        "llama",
        peft.OFTConfig(oft_block_size=4, target_modules=SOME, block_share=True),
    ),
    "miss": ("llama", peft.MissConfig(r=4, target_modules=SOME)),
    "miss_uneven": ("llama", peft.MissConfig(r=3, target_modules=SOME)),
    "miss_mini": (
        "llama",
        peft.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=SOME),
    ),
    "tokens": ("llama", peft.TrainableTokensConfig(token_indices=[1, 5])),
    "tokens_tied": ("qwen2", peft.TrainableTokensConfig(token_indices=[2, 7, 8])),
}


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    for name, (base_name, config) in CASES.items():
        torch.manual_seed(len(name))
        model = peft.get_peft_model(base(base_name), config).eval()
        with torch.no_grad():
            for value in model.parameters():
                if value.requires_grad:  # in place, because some arrays are tied
                    value.add_(0.2 * torch.randn_like(value))
            fed = inputs(base_name)
            if "input_ids" in fed:
                fed["input_ids"][0, :3] = torch.tensor([1, 5, 7])  # tokens that are trained
            out = model(**fed)
            out = out if base_name == "toy" else out.logits
        model.save_pretrained(HERE / name)
        (HERE / name / "README.md").unlink()
        arrays = {key: x.numpy() for key, x in fed.items()}
        np.savez_compressed(HERE / name / "expected.npz", out=out.numpy(), **arrays)


if __name__ == "__main__":
    main()
