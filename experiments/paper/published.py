"""The paper's own numbers, with which the report compares ours.

They are from Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685,
version 2, and all of them were checked against its text. Scores are in the paper's units: per cent
of accuracy for MNLI, SST-2 and WikiSQL, BLEU for E2E.
"""

from __future__ import annotations

from typing import NamedTuple

# Table 5: GPT-3 175B with 18M trained parameters; matrices -> (WikiSQL, MNLI).
MATRICES: dict[tuple[str, ...], tuple[float, float]] = {
    ("query",): (70.4, 91.0),
    ("key",): (70.0, 90.8),
    ("value",): (73.0, 91.0),
    ("output",): (73.2, 91.3),
    ("query", "key"): (71.4, 91.3),
    ("query", "value"): (73.7, 91.3),
    ("query", "key", "value", "output"): (73.7, 91.7),
}

# Table 6: GPT-3 175B; matrices -> rank -> (WikiSQL, MNLI).
RANKS: dict[tuple[str, ...], dict[int, tuple[float, float]]] = {
    ("query",): {
        1: (68.8, 90.7),
        2: (69.6, 90.9),
        4: (70.5, 91.1),
        8: (70.4, 90.7),
        64: (70.0, 90.7),
    },
    ("query", "value"): {
        1: (73.4, 91.3),
        2: (73.3, 91.4),
        4: (73.7, 91.3),
        8: (73.8, 91.6),
        64: (73.5, 91.4),
    },
    ("query", "key", "value", "output"): {
        1: (74.1, 91.2),
        2: (73.7, 91.7),
        4: (74.0, 91.7),
        8: (74.0, 91.5),
        64: (73.9, 91.4),
    },
}

# Table 18: GPT-2 medium on E2E; rank -> (validation loss, BLEU).
GENERATION: dict[int, tuple[float, float]] = {
    1: (1.23, 68.72),
    2: (1.21, 69.17),
    4: (1.18, 70.38),
    8: (1.17, 69.57),
    16: (1.16, 69.61),
    32: (1.16, 69.33),
    64: (1.16, 69.24),
    128: (1.16, 68.73),
    256: (1.16, 68.92),
    512: (1.16, 68.78),
    1024: (1.17, 69.37),
}


class PublishedAmplification(NamedTuple):
    """Table 7 for one rank: ‖UᵀWV‖ with U and V of the update, of W and random, ‖W‖ and ‖ΔW‖."""

    along_update: float
    along_weight: float
    along_random: float
    weight: float
    update: float


# Table 7: W_q of the 48th layer of GPT-3; rank -> norms.
AMPLIFICATION: dict[int, PublishedAmplification] = {
    4: PublishedAmplification(0.32, 21.67, 0.02, 61.95, 6.91),
    64: PublishedAmplification(1.90, 37.71, 0.33, 61.95, 3.57),
}


class Scored(NamedTuple):
    """A row of a table of methods: millions of trained parameters, and scores by column."""

    model: str
    millions: float
    scores: dict[str, float]


# Tables 2 and 3: our name of the method -> rows. SST-2 is the task most like the movie reviews. The
# rows of RoBERTa large marked "restricted" follow the setup of Houlsby et al.
METHODS: dict[str, tuple[Scored, ...]] = {
    "full": (
        Scored("RoBERTa base", 125.0, {"SST-2": 94.8, "GLUE": 86.4}),
        Scored("RoBERTa large", 355.0, {"SST-2": 96.4, "GLUE": 88.9}),
        Scored("GPT-2 medium", 354.92, {"BLEU": 68.2}),
    ),
    "bitfit": (Scored("RoBERTa base", 0.1, {"SST-2": 93.7, "GLUE": 85.2}),),
    "adapter_drop": (
        Scored("RoBERTa base", 0.3, {"SST-2": 94.2, "GLUE": 84.4}),
        Scored("RoBERTa base", 0.9, {"SST-2": 94.7, "GLUE": 85.4}),
    ),
    "pfeiffer": (
        Scored("RoBERTa large, restricted", 3.0, {"SST-2": 96.1, "GLUE": 88.4}),
        Scored("RoBERTa large, restricted", 0.8, {"SST-2": 96.6, "GLUE": 87.9}),
    ),
    "houlsby": (
        Scored("RoBERTa large, restricted", 6.0, {"SST-2": 96.2, "GLUE": 87.8}),
        Scored("RoBERTa large, restricted", 0.8, {"SST-2": 96.3, "GLUE": 86.4}),
        Scored("GPT-2 medium", 11.09, {"BLEU": 67.3}),
    ),
    "lin": (
        Scored("GPT-2 medium", 0.37, {"BLEU": 66.3}),
        Scored("GPT-2 medium", 11.09, {"BLEU": 68.9}),
    ),
    "top_layers": (Scored("GPT-2 medium", 25.19, {"BLEU": 68.1}),),
    "prefix_layer": (Scored("GPT-2 medium", 0.35, {"BLEU": 69.7}),),
    "lora": (
        Scored("RoBERTa base", 0.3, {"SST-2": 95.1, "GLUE": 87.2}),
        Scored("RoBERTa large", 0.8, {"SST-2": 96.2, "GLUE": 89.0}),
        Scored("RoBERTa large, restricted", 0.8, {"SST-2": 96.2, "GLUE": 88.6}),
        Scored("GPT-2 medium", 0.35, {"BLEU": 70.4}),
    ),
}

# Table 16: GPT-3 175B on MNLI; our name of the method -> training examples -> accuracy.
SAMPLES: dict[str, dict[int, float]] = {
    "full": {100: 60.2, 1_000: 85.8, 10_000: 88.9, 392_000: 89.5},
    "prefix_embedding": {100: 37.6, 1_000: 75.2, 10_000: 79.5, 392_000: 88.6},
    "prefix_layer": {100: 48.3, 1_000: 82.5, 10_000: 85.9, 392_000: 89.6},
    "lora": {100: 63.8, 1_000: 85.6, 10_000: 89.2, 392_000: 91.7},
}


class Latency(NamedTuple):
    """Table 1: milliseconds of one forward pass and their standard deviation over 100 trials."""

    milliseconds: float
    deviation: float


# GPT-2 medium on a Quadro RTX8000; (batch, length) -> our name of the method -> time. LoRA is
# merged.
LATENCY: dict[tuple[int, int], dict[str, Latency]] = {
    (32, 512): {
        "lora": Latency(1449.4, 0.8),
        "lin": Latency(1482.0, 1.0),
        "houlsby": Latency(1492.2, 1.0),
    },
    (16, 256): {
        "lora": Latency(338.0, 0.6),
        "lin": Latency(354.8, 0.5),
        "houlsby": Latency(366.3, 0.5),
    },
    (1, 128): {
        "lora": Latency(19.8, 2.7),
        "lin": Latency(23.9, 2.1),
        "houlsby": Latency(25.8, 2.2),
    },
}

# Table 1's |Θ|: millions of parameters of both kinds of adapter layers in that column.
LATENCY_MILLIONS: dict[tuple[int, int], float] = {(32, 512): 0.5, (16, 256): 11.0, (1, 128): 11.0}


class Benefit(NamedTuple):
    """Section 4.2, "Practical benefits": GPT-3 175B, full fine-tuning and LoRA (r = 4, q and v)."""

    full: float
    lora: float


# Bytes of memory in training, bytes of a checkpoint, tokens per second and GPU.
MEMORY = Benefit(1.2e12, 350e9)
CHECKPOINT = Benefit(350e9, 35e6)
SPEED = Benefit(32.5, 43.1)
