"""LoRA on GPT-2 medium and large for E2E, as in the LoRA paper (arXiv 2106.09685, table 11).

Command:   python train.py --config configs/gpt2_e2e.py:medium
           (medium or large; without a name it is medium)
Hardware:  one GPU of 16 GB: --plan counts 6.4 GB (medium) and 12.0 GB (large); needs
           `pip install huggingface_hub`, and the network for the weights (hub) and for E2E (TFDS)
Hours:     not measured: the machine on which this was written could not reach the hub and E2E.
           The shapes are tested with stand-in data, the training on a tiny random GPT-2
Result:    the paper reports BLEU, NIST, METEOR, ROUGE-L and CIDEr of 70.4, 8.85, 46.8, 71.8, 2.53
           (medium) and 70.4, 8.89, 46.8, 72.0, 2.47 (large), means over three seeds, of texts
           written by beam search (10 beams, length penalty 0.9, no 4-gram twice). This config
           measures the loss, without label smoothing.

Rank 4 on q and v is 393,216 parameters (medium) and 737,280 (large). The paper says 0.35M and
0.77M, which are the numbers of the prefix tuning that it compares with.

Settings that the table does not give are from the code released with the paper (microsoft/LoRA,
examples/NLG): dropout before the update and none in GPT-2 itself, eps 1e-6, no clipping, a uniform
A, and the end token between the table and the text. The data differ. TFDS has only the cleaned
version of E2E: 33,525 training examples, where the paper has 42,061. Its tables read
`name[Alimentum], area[city centre]`, the paper's `name : Alimentum | area : city centre`. To train
on the original, write it to JSONL files and give --data.source.
"""

import math

from lora_jax.data.config import DataConfig
from lora_jax.training.causal_lm import causal_lm
from lora_jax.training.config import LoraConfig, OptimizerConfig
from lora_jax.training.text import ModelConfig, TextConfig

SIZE = 33_525  # examples of the training split
BATCH = 8
STEPS = 5 * math.ceil(SIZE / BATCH)
END = "<|endoftext|>"


def setup(name: str, width: int) -> TextConfig:
    """Return the config of the GPT-2 with this name and hidden size."""
    query_and_value = f"parts=0:{width}+{2 * width}:{width}"
    return TextConfig(
        workload=causal_lm,
        model=ModelConfig(reference=f"hub:openai-community/{name}", scan_layers=True),
        data=DataConfig(
            source="tfds:gem/e2e_nlg",
            prompt="{meaning_representation}" + END,
            answer=" {target}",
            eos=END,
            max_length=160,  # the original's validation and test splits reach 136
            pack=False,
            batch_size=BATCH,
        ),
        lora=LoraConfig(
            rank=4,
            alpha=32.0,
            targets=(f"layers*/attention/qkv/kernel@{query_and_value}",),
            init="uniform",
            dropout=0.1,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4,
            schedule="linear",
            warmup=500 / STEPS,
            weight_decay=0.01,
            clip=None,
            eps=1e-6,
        ),
        label_smoothing=0.1,
        steps=STEPS,
        evaluate_every=math.ceil(SIZE / BATCH),
        checkpoint_every=1000,
    )


medium = setup("gpt2-medium", width=1024)
large = setup("gpt2-large", width=1280)

config = medium
