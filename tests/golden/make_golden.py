"""Write golden_models/: tiny random models, and the results of Hugging Face transformers.

    pip install torch transformers
    python tests/golden/make_golden.py

Every parameter is random, norms and biases included, so that a lost parameter is noticed. The
folder was written with torch 2.13.0 and transformers 5.24.0; other versions give the same within
rounding.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers as hf

HERE = Path(__file__).parent / "golden_models"
SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 12,
}
DECODER = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 100.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}
ENCODER = {**SIZES, "num_labels": 3}


def main() -> None:
    torch.manual_seed(0)
    write("llama", hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, rope_parameters=LLAMA3)))
    write(
        "llama_biased",
        hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, rope_parameters=LINEAR, attention_bias=True)),
    )
    write(
        "mistral",
        hf.MistralForCausalLM(hf.MistralConfig(**DECODER, sliding_window=4, head_dim=6)),
    )
    write("qwen2", hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER, tie_word_embeddings=True)))
    write("qwen3", hf.Qwen3ForCausalLM(hf.Qwen3Config(**DECODER, head_dim=8)))
    bert = hf.BertConfig(**ENCODER, max_position_embeddings=12)
    write("bert", hf.BertForSequenceClassification(bert), shard="9KB")
    roberta = hf.RobertaConfig(
        **ENCODER, max_position_embeddings=14, type_vocab_size=1, layer_norm_eps=1e-5
    )
    write("roberta", hf.RobertaForSequenceClassification(roberta))


def write(name: str, model: hf.PreTrainedModel, shard: str = "1GB") -> None:
    model.eval().requires_grad_(False)
    model.config._attn_implementation = "eager"
    for path, value in model.named_parameters():
        centre = 1.0 if "norm" in path.lower() and path.endswith("weight") else 0.0
        value.copy_(centre + 0.3 * torch.randn_like(value))
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    np.savez_compressed(folder / "expected.npz", **expected(name, model))


def expected(name: str, model: hf.PreTrainedModel) -> dict[str, np.ndarray]:
    """Inputs (two rows, the second one shorter) and outputs."""
    length = 11
    ids = torch.randint(3, SIZES["vocab_size"], (2, length))
    mask = torch.ones_like(ids)
    if name in ("bert", "roberta"):
        # RoBERTa's rows are padded on the left, where its positions differ from BERT's.
        padding = slice(0, 3) if name == "roberta" else slice(length - 3, length)
        mask[1, padding] = 0
        ids[mask == 0] = model.config.pad_token_id
        types = torch.zeros_like(ids)
        if name == "bert":
            types[:, 5:] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        outputs = {
            "hidden": model.base_model(**inputs).last_hidden_state,
            # The classification head is called without token types.
            "logits": model(input_ids=ids, attention_mask=mask).logits,
        }
    else:
        mask[1, length - 3 :] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        outputs = {"logits": model(**inputs).logits}
    both = {**inputs, **outputs}
    return {key: value.numpy() for key, value in both.items()}


if __name__ == "__main__":
    main()
