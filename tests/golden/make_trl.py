"""Write golden_trl/: losses, gradients and metrics of single steps of TRL's trainers.

    pip install torch transformers peft trl
    python tests/golden/make_trl.py

The base is golden_models/llama. The reference has the adapter `reference`, and the model that
learns has `policy`; both are random. A gradient is kept in the form of an adapter. The folder was
written with torch 2.13.0, transformers 5.24.0, peft 0.21.2 and trl 1.16.0.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import peft
import safetensors.torch
import torch
import transformers as hf
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

BASE = Path(__file__).parent / "golden_models" / "llama"
HERE = Path(__file__).parent / "golden_trl"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WORDS = [f"word{i}" for i in range(19)]
ROWS = 6

SFT, DPO = (trl.SFTTrainer, trl.SFTConfig, "answers"), (trl.DPOTrainer, trl.DPOConfig, "pairs")
KTO = (trl.KTOTrainer, trl.KTOConfig, "judged")
# Name -> (the trainer, its config and its rows, settings)
CASES = {
    "sft": (SFT, {}),
    "robust": (DPO, {"loss_type": "robust", "label_smoothing": 0.2}),
    "kto": (KTO, {"desirable_weight": 1.5, "undesirable_weight": 0.75}),
    **{n: (DPO, {"loss_type": n}) for n in ("sigmoid", "hinge", "ipo", "apo_zero", "nca_pair")},
}


def write_tokenizer():
    """Write a tokenizer with one token for each word."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(SPECIAL)
    made.save(str(HERE / "tokenizer.json"), pretty=False)
    (HERE / "tokenizer_config.json").write_text('{"eos_token": "</s>"}\n')


def write_rows():
    """Write pairs, judged answers, and answers alone."""
    random = np.random.default_rng(4)

    def text(most):
        return "".join(f" {word}" for word in random.choice(WORDS, random.integers(1, most)))

    pairs = [{"prompt": text(6)[1:], "chosen": text(8), "rejected": text(5)} for _ in range(ROWS)]
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    judged = [{**row, "label": i % 3 > 0} for i, row in enumerate(answers)]
    for name, rows in {"pairs": pairs, "answers": answers, "judged": judged}.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (HERE / f"{name}.jsonl").write_text("".join(lines))


def write_adapters():
    """Write two random adapters of the base."""
    for seed, name in enumerate(("reference", "policy")):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
        model = peft.get_peft_model(hf.AutoModelForCausalLM.from_pretrained(BASE), config)
        with torch.no_grad():
            for path, value in model.named_parameters():
                if "lora_" in path:
                    value.copy_(0.3 * torch.randn_like(value))
        model.save_pretrained(HERE / name)
        (HERE / name / "README.md").unlink()


def step(name):
    """Return the loss and the metrics of a step, and write its gradient."""
    (make, config, rows), settings = CASES[name]
    model = hf.AutoModelForCausalLM.from_pretrained(BASE)
    model = peft.PeftModel.from_pretrained(model, HERE / "reference", is_trainable=True)
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_file=str(HERE / "tokenizer.json"), eos_token="</s>", pad_token="<pad>"
    )
    with tempfile.TemporaryDirectory() as folder:
        options = {"beta": 0.3} if name != "sft" else {}
        options |= {"bf16": False, "gradient_checkpointing": False, "use_cpu": True}
        options |= {"per_device_train_batch_size": ROWS, "report_to": "none", **settings}
        lines = (HERE / f"{rows}.jsonl").read_text().splitlines()
        trainer = make(
            model=model,
            args=config(output_dir=folder, **options),
            train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
            processing_class=tokenizer,
        )
        # The trainer has copied the adapter as its reference; now the model has moved on.
        moved = safetensors.torch.load_file(HERE / "policy" / "adapter_model.safetensors")
        peft.set_peft_model_state_dict(trainer.model, moved)
        trainer.model.train()
        (batch,) = trainer.get_train_dataloader()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        metrics = {key: float(values[-1]) for key, values in trainer._metrics["train"].items()}
    slopes = {
        key.replace(".default", ""): value.grad
        for key, value in trainer.model.named_parameters()
        if ".default" in key
    }
    safetensors.torch.save_file(slopes, HERE / f"{name}.safetensors")
    return {"loss": loss.item(), **metrics}


def main():
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    write_tokenizer()
    write_rows()
    write_adapters()
    expected = {name: step(name) for name in CASES}
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
