"""Write golden_peft/: adapters that the published PEFT wrote, and the logits of their models.

    pip install torch transformers peft
    python tests/golden/make_peft.py
    pip install peft==0.17.1        # and 0.18.1, 0.19.0, 0.19.1, 0.21.2
    python tests/golden/make_peft.py experts

The bases are in golden_models/, or `Toy`, whose weights are in golden_peft/toy.npz. Every element
of an adapter is random, so that a lost parameter is noticed. The folder was written with torch
2.13.0, transformers 5.24.0 and peft 0.21.2.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import peft
import torch
import transformers as hf

MODELS = Path(__file__).parent / "golden_models"
HERE = Path(__file__).parent / "golden_peft"
QV = ["q_proj", "v_proj"]

# Name -> (base, settings of LoraConfig)
CASES = {
    "plain": ("llama", {"target_modules": QV, "lora_alpha": 8}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True, "r": 3}),
    "patterns": (
        "llama",
        {
            "target_modules": [*QV, "down_proj", "gate_proj"],
            "rank_pattern": {
                "q_proj": 2,
                "layers.1.mlp.down_proj": 6,
                r"^model\.layers\.0.*v_proj": 3,
            },
            "alpha_pattern": {"q_proj": 3, ".*gate_proj": 1.5},
        },
    ),
    "dora": ("llama", {"target_modules": [*QV, "up_proj"], "use_dora": True}),
    "dora_rslora": ("llama", {"target_modules": QV, "use_dora": True, "use_rslora": True, "r": 2}),
    "excluded": ("llama", {"target_modules": QV, "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "one_layer": (
        "llama",
        {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "regex": ("llama", {"target_modules": r"model\.layers\.\d+\.(self_attn\.[qk]|mlp\.up)_proj"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "dora_embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "saved": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head", "model.norm"]}),
    "named": ("llama", {"target_modules": QV}),
    "tokens": ("llama", {"target_modules": QV, "trainable_token_indices": [1, 5]}),
    "high_rank": ("llama", {"target_modules": QV, "r": 20}),
    "bias_all": ("llama_biased", {"target_modules": QV, "bias": "all"}),
    "bias_lora_only": ("llama_biased", {"target_modules": QV, "bias": "lora_only"}),
    "lora_bias": ("llama_biased", {"target_modules": QV, "lora_bias": True, "use_rslora": True}),
    "tokens_tied": ("qwen2", {"target_modules": QV, "trainable_token_indices": [2, 7]}),
    "tied": (
        "qwen2",
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "half_tied": ("qwen2", {"target_modules": ["embed_tokens"]}),
    "bert": ("bert", {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
    "roberta": ("roberta", {"target_modules": ["key"], "task_type": "SEQ_CLS", "bias": "all"}),
    "decoder_classifier": ("llama", {"target_modules": QV, "task_type": "SEQ_CLS"}),
    "alora": (
        "llama",
        {
            "target_modules": [*QV, "down_proj"],
            "task_type": "CAUSAL_LM",
            "alora_invocation_tokens": [5, 9],
        },
    ),
    "toy": ("toy", {"target_modules": ["conv1", "conv2", "fused", "out"], "fan_in_fan_out": True}),
    "toy_dora": ("toy", {"target_modules": ["conv1", "conv2", "fused", "out"], "use_dora": True}),
}
CLASSES = {
    "bert": hf.BertForSequenceClassification,
    "roberta": hf.RobertaForSequenceClassification,
}


class Toy(torch.nn.Module):
    """[B, 3, 6, 6] to [B, 2]: two convolutions, GPT-2's Conv1D of q, k and v, a product."""

    def __init__(self):
        super().__init__()
        self.conv2 = torch.nn.Conv2d(3, 4, (3, 2))
        self.conv1 = torch.nn.Conv1d(4, 5, 3)
        self.fused = hf.pytorch_utils.Conv1D(3 * 4, 5)
        self.out = torch.nn.Linear(4, 2)

    def forward(self, x):
        x = torch.tanh(self.conv2(x)).flatten(2)
        x = torch.tanh(self.conv1(x)).transpose(1, 2).contiguous()
        q, k, v = self.fused(x).split(4, dim=-1)
        return self.out(torch.softmax(q @ k.transpose(1, 2), -1) @ v).mean(1)


class Experts(torch.nn.Module):
    """Four experts in two parameters, [experts, out, in] unless `is_transposed`."""

    def __init__(self, transposed, square):
        super().__init__()
        self.is_transposed = transposed
        width, inner = (4, 4) if square else (5, 3)
        up, down = (4, 2 * inner, width), (4, width, inner)
        if transposed:
            up, down = (4, width, 2 * inner), (4, inner, width)
        self.gate_up_proj = torch.nn.Parameter(0.4 * torch.randn(up))
        self.down_proj = torch.nn.Parameter(0.4 * torch.randn(down))

    def forward(self, x):
        turn = (lambda w: w) if self.is_transposed else (lambda w: w.transpose(1, 2))
        gate, up = torch.einsum("bi,eio->beo", x, turn(self.gate_up_proj)).chunk(2, dim=-1)
        return torch.einsum("bei,eio->bo", torch.tanh(gate) * up, turn(self.down_proj))


class Mixture(torch.nn.Module):
    def __init__(self, *args):
        super().__init__()
        self.experts = Experts(*args)

    def forward(self, x):
        return self.experts(x)


def write_experts():
    """Write experts in both ways to store them, as this version of PEFT reads them."""
    for transposed in (False, True):
        for square in (False, True):
            torch.manual_seed(3)
            model = Mixture(transposed, square)
            start = {k.replace(".", "/"): v.detach().numpy() for k, v in model.named_parameters()}
            both = {"experts.gate_up_proj", "experts.down_proj"}
            config = peft.LoraConfig(
                r=2, lora_alpha=3, target_modules=[], target_parameters=sorted(both)
            )
            start = {k: v.copy() for k, v in start.items()}
            model = peft.get_peft_model(model, config).eval()
            with torch.no_grad():
                randomise(model)
                x = torch.randn(3, 4 if square else 5)
                out = model(x)
            form = f"{'transposed' if transposed else 'plain'}{'_square' if square else ''}"
            folder = HERE / f"experts_{peft.__version__}_{form}"
            model.save_pretrained(folder)
            (folder / "README.md").unlink()
            np.savez_compressed(folder / "expected.npz", out=out.numpy(), x=x.numpy(), **start)


def base(name, task=None):
    if name == "llama" and task == "SEQ_CLS":
        more = {"num_labels": 3, "pad_token_id": 0}
        return hf.LlamaForSequenceClassification.from_pretrained(MODELS / name, **more)
    if name != "toy":
        return CLASSES.get(name, hf.AutoModelForCausalLM).from_pretrained(MODELS / name)
    torch.manual_seed(1)
    model = Toy()
    for value in model.parameters():
        value.data = 0.4 * torch.randn_like(value)
    return model


def inputs(name):
    if name == "toy":
        return {"x": torch.randn(2, 3, 6, 6)}
    return {"input_ids": torch.randint(3, 23, (2, 7))}


def randomise(model):
    """Draw all arrays of the adapter at random."""
    for path, value in model.named_parameters():
        held = ("lora_", "modules_to_save", "trainable_tokens_delta")
        if "magnitude" in path:
            value.mul_(1 + 0.3 * torch.randn_like(value))
        elif any(x in path for x in held) or path.endswith(".bias"):
            value.copy_(0.3 * torch.randn_like(value))  # in place, because some arrays are tied


def write(name, base_name, settings):
    torch.manual_seed(len(name))
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 5, **settings})
    adapter_name = "other" if name == "named" else "default"
    model = base(base_name, config.task_type)
    model = peft.get_peft_model(model, config, adapter_name=adapter_name).eval()
    before = {k: v.clone() for k, v in model.named_parameters() if k.endswith(".bias")}
    with torch.no_grad():
        randomise(model)
        if config.bias == "none":  # then the file does not have the base's own biases
            for path, value in model.named_parameters():
                if path in before and "modules_to_save" not in path and "lora_B" not in path:
                    value.copy_(before[path])
        if config.bias == "lora_only":
            for path, value in model.named_parameters():
                if path in before and "base_layer" not in path:
                    value.copy_(before[path])
        fed = inputs(base_name)
        if name == "decoder_classifier":
            fed["input_ids"][0, 4:] = 0  # padding
        if name == "alora":  # twice in the first row, and not in the second
            fed["input_ids"][0] = torch.tensor([5, 9, 4, 5, 9, 3, 7])
        out = model(**fed)
        out = out if base_name == "toy" else out.logits
    model.save_pretrained(HERE / name)
    for readme in (HERE / name).rglob("README.md"):
        readme.unlink()
    arrays = {key: x.numpy() for key, x in fed.items()}
    np.savez_compressed(HERE / name / "expected.npz", out=out.numpy(), **arrays)


def write_mixed():
    """Write a batch whose rows have their own adapters, given by adapter_names."""
    torch.manual_seed(5)
    names = ["plain", "__base__", "rslora", "regex"]
    model = peft.PeftModel.from_pretrained(base("llama"), HERE / "plain", adapter_name="plain")
    for name in ("rslora", "regex"):
        model.load_adapter(HERE / name, adapter_name=name)
    ids = torch.randint(3, 23, (4, 7))
    with torch.no_grad():
        out = model.eval()(input_ids=ids, adapter_names=names).logits
    np.savez_compressed(HERE / "mixed.npz", out=out.numpy(), input_ids=ids.numpy(), names=names)


def main():
    if sys.argv[1:] == ["experts"]:
        return write_experts()
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    toy = {path.replace(".", "/"): x.detach().numpy() for path, x in base("toy").named_parameters()}
    np.savez_compressed(HERE / "toy.npz", **toy)
    for name, (base_name, settings) in CASES.items():
        write(name, base_name, settings)
    write_mixed()
    return None


if __name__ == "__main__":
    main()
