"""The worker of PyTorch, `transformers` and PEFT for `compare.py`. It does not import JAX.

It has the same shapes and losses as `ours.py`. Dropout is 0 and the weights are random, as there.
Each run exists with both implementations of attention, `name/eager` and `name/sdpa`, and the
comparison takes the faster one.
"""

import sys

import peft
import torch
import transformers
from torch.nn import functional
from worker import serve  # from this folder: `benchmarks` imports JAX

QUERY_VALUE = {"minilm": r".*\.(query|value)", "smollm2": r".*\.(q_proj|v_proj)"}
ALL_LINEAR = {
    "minilm": r".*\.(query|key|value|dense)",
    "smollm2": r".*\.(q|k|v|o|gate|up|down)_proj",
}


class TorchClassifier(torch.nn.Module):
    """A BERT encoder with mean pooling and two classes."""

    def __init__(self, attention):
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=30_522,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation=attention,
        )
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.head = torch.nn.Linear(384, 2)

    def forward(self, input_ids):
        return self.head(self.bert(input_ids=input_ids).last_hidden_state.mean(1))


class TorchDecoder(torch.nn.Module):
    """A Llama decoder with tied embeddings."""

    def __init__(self, attention):
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            tie_word_embeddings=True,
            attn_implementation=attention,
        )
        self.llama = transformers.LlamaForCausalLM(config)

    def forward(self, input_ids):
        return self.llama(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)


BUILD = {"minilm": (TorchClassifier, (32, 48), 30_522), "smollm2": (TorchDecoder, (8, 48), 49_152)}


def step(model, ids, labels):
    """Return a function that takes a training step: mean cross entropy, its gradient, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run():
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(ids), labels).backward()
        optimizer.step()

    return run


def main() -> None:
    name, threads, *wanted = sys.argv[1:]
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    build, shape, vocabulary = BUILD[name]
    ids = torch.randint(0, vocabulary, shape)
    labels = torch.randint(0, 2, shape[:1]) if name == "minilm" else ids.flatten()
    targets = {"q and v": QUERY_VALUE[name], "all-linear": ALL_LINEAR[name]}
    runs = {}
    for attention in ("eager", "sdpa"):
        for what in wanted or ("full", *targets):
            model = build(attention)
            if what != "full":
                config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets[what])
                model = peft.get_peft_model(model, config)
            runs[f"{what}/{attention}"] = step(model, ids, labels)
    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__} ({capability}), transformers {transformers.__version__}"
    serve(runs, f"{versions}, peft {peft.__version__}")


if __name__ == "__main__":
    main()
