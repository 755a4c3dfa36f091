"""LoRA on RoBERTa-base for GLUE, with the settings of the LoRA paper (arXiv 2106.09685, table 9).

Command:   python train.py --config configs/glue_roberta.py:mrpc
           (mnli, sst2, mrpc, cola, qnli, qqp, rte or stsb; without a name it is sst2)
Hardware:  one GPU of 16 GB; needs `pip install huggingface_hub`, and the network for the weights
           (hub) and for GLUE (TFDS)
Hours:     not measured: the machine on which this was written could not reach the hub and GLUE.
           The shapes are tested with stand-in data and a tiny random RoBERTa
Result:    the paper reports, as medians over five seeds: MNLI 87.5, SST-2 95.1, MRPC 89.7,
           CoLA 63.4 (Matthews), QNLI 93.3, QQP 90.8, RTE 86.6, STS-B 91.5 (Pearson)

The paper starts MRPC, RTE and STS-B from its MNLI adapter; here every task starts from new
adapters.
"""

import math

from lora_jax.data.config import DataConfig
from lora_jax.training.classification import classification
from lora_jax.training.config import LoraConfig, OptimizerConfig
from lora_jax.training.text import ModelConfig, TextConfig


def task(
    name: str, fields: tuple[str, ...], size: int, rate: float, batch_size: int, epochs: int
) -> TextConfig:
    """Return the config of the GLUE task `name`, whose training split has `size` examples."""
    steps = epochs * math.ceil(size / batch_size)
    select = {"cola": "matthews", "stsb": "pearson"}.get(name, "accuracy")
    return TextConfig(
        workload=classification,
        model=ModelConfig(
            reference="hub:FacebookAI/roberta-base", pooling="roberta_head", dropout=0.1
        ),
        data=DataConfig(
            source=f"tfds:glue/{name}",
            text_fields=fields,
            regression=name == "stsb",
            max_length=512,
            buckets=(32, 64, 128, 256, 512),
            batch_size=batch_size,
            eval_split="validation_matched" if name == "mnli" else "validation",
            test_split="",  # GLUE hides the labels of its test splits
        ),
        lora=LoraConfig(
            rank=8, alpha=8.0, targets=("bert/encoder/layer*/attention/{query,value}/kernel",)
        ),
        optimizer=OptimizerConfig(learning_rate=rate, schedule="linear", warmup=0.06),
        select=select,
        steps=steps,
        evaluate_every=math.ceil(size / batch_size),
        checkpoint_every=min(1000, math.ceil(size / batch_size)),
    )


mnli = task("mnli", ("premise", "hypothesis"), 392_702, rate=5e-4, batch_size=16, epochs=30)
sst2 = task("sst2", ("sentence",), 67_349, rate=5e-4, batch_size=16, epochs=60)
mrpc = task("mrpc", ("sentence1", "sentence2"), 3_668, rate=4e-4, batch_size=16, epochs=30)
cola = task("cola", ("sentence",), 8_551, rate=4e-4, batch_size=32, epochs=80)
qnli = task("qnli", ("question", "sentence"), 104_743, rate=4e-4, batch_size=32, epochs=25)
qqp = task("qqp", ("question1", "question2"), 363_846, rate=5e-4, batch_size=16, epochs=25)
rte = task("rte", ("sentence1", "sentence2"), 2_490, rate=5e-4, batch_size=32, epochs=80)
stsb = task("stsb", ("sentence1", "sentence2"), 5_749, rate=4e-4, batch_size=16, epochs=40)

config = sst2
