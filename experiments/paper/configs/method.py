"""One run of MiniLM on the movie reviews, by LoRA or by another method of docs/methods.md.

Command:   python train.py --config experiments/paper/configs/method.py --method.name pfeiffer
Hardware:  2 CPU cores, 2 GB of memory; 4 GB for `--method.name full`
Minutes:   2 to 4
Result:    as configs/minilm_reviews.py for LoRA; docs/paper.md compares the methods
"""

from configs import minilm_reviews
from experiments.methods.config import MethodTextConfig

config = MethodTextConfig.like(minilm_reviews.config)
